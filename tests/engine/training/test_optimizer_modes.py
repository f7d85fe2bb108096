"""Schedule-free optimizers, whose `train` and `eval` switch the weights: see arXiv 2405.15682."""

import pytest
import torch

import engine
from tests.testing.distributed import run_distributed_test

BETA, LR, STEPS = 0.9, 0.1, 4


class ScheduleFreeSGD(torch.optim.Optimizer):
    """Schedule-free SGD: the weights are y in training, and the average x in evaluation."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "train_mode": False, "k": 0})

    @torch.no_grad()
    def _switch(self, train_mode, weight):
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight)
                group["train_mode"] = train_mode

    def train(self):
        self._switch(True, 1 - BETA)

    def eval(self):
        self._switch(False, 1 - 1 / BETA)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("the optimizer is not in train mode")
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                z = state.setdefault("z", p.clone())
                p.lerp_(z, 1 - 1 / BETA)  # x
                z.sub_(p.grad, alpha=group["lr"])
                p.lerp_(z, 1 / group["k"])
                p.lerp_(z, 1 - BETA)  # y


def start(**config):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    config = {"train_batch_size": 2, "gradient_clipping": 0, **config}
    trainer, *_ = engine.initialize(
        config=config, model=model, optimizer=lambda params: ScheduleFreeSGD(params, LR)
    )
    return trainer


def train(trainer, steps):
    for step in steps:
        trainer.backward(compute_loss(trainer, step))
        trainer.step()


def compute_loss(model, step):
    return (model(torch.full((2, 3), float(step + 1) / STEPS)) - 1).pow(2).mean()


def read(trainer):
    weights = [each.detach() for each in trainer.module.parameters()]
    return [w.full_tensor() if hasattr(w, "full_tensor") else w.clone() for w in weights]


def compute_average():
    """Compute x after `STEPS` steps from the definition: the mean of all z."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1).double()
    z = [each.detach().clone() for each in model.parameters()]
    x = [each.clone() for each in z]
    for step in range(STEPS):
        for p, own_z, own_x in zip(model.parameters(), z, x, strict=True):
            p.data = (1 - BETA) * own_z + BETA * own_x
        gradients = torch.autograd.grad(compute_loss(model.float(), step), model.parameters())
        for own_z, own_x, gradient in zip(z, x, gradients, strict=True):
            own_z.sub_(LR * gradient)
            own_x.add_((own_z - own_x) / (step + 1))
    return [each.float() for each in x]


def test_eval_and_train_reach_the_optimizer():
    trainer = start()
    train(trainer, range(STEPS))
    in_training = read(trainer)
    trainer.eval()
    assert not trainer.module.training
    torch.testing.assert_close(read(trainer), compute_average())
    assert trainer.train() is trainer
    torch.testing.assert_close(read(trainer), in_training)
    assert not torch.allclose(in_training[0], compute_average()[0], atol=1e-4)


def test_evaluate_uses_the_averaged_weights_and_then_continues():
    trainer, other = start(), start()
    train(trainer, range(STEPS))
    seen = []
    batches = [torch.ones(1, 3)]
    trainer.evaluate(batches, lambda _: seen.append(read(trainer)) or 0.0)
    torch.testing.assert_close(seen[0], compute_average())
    train(trainer, range(STEPS))
    train(other, [*range(STEPS), *range(STEPS)])
    torch.testing.assert_close(read(trainer), read(other))


@pytest.mark.parametrize("saved_in_eval", [False, True])
@pytest.mark.parametrize("loaded_in_eval", [False, True])
def test_resumed_run_equals_the_uninterrupted_run(tmp_path, saved_in_eval, loaded_in_eval):
    trainer = start()
    train(trainer, range(2))
    trainer.train(not saved_in_eval)
    trainer.save_checkpoint(tmp_path)
    resumed = start()
    resumed.train(not loaded_in_eval)
    resumed.load_checkpoint(tmp_path)
    for each in (trainer, resumed):
        each.train()
        train(each, range(2, STEPS))
        each.eval()
    torch.testing.assert_close(read(resumed), read(trainer))
    torch.testing.assert_close(read(resumed), compute_average())


def test_automatically_resumed_run_starts_in_train_mode(tmp_path):
    settings = {"engine": {"checkpoint": {"dir": str(tmp_path), "every": 2}}}
    trainer = start(**settings)
    train(trainer, range(2))
    trainer.destroy()
    resumed = start(**settings)
    assert resumed.global_steps == 2
    train(resumed, range(2, STEPS))
    resumed.eval()
    torch.testing.assert_close(read(resumed), compute_average())


def average_on_every_stage():
    for stage in range(4):
        trainer = start(zero_optimization={"stage": stage}, engine={"backend": "torch"})
        train(trainer, range(STEPS))
        trainer.eval()
        torch.testing.assert_close(read(trainer), compute_average())


def test_eval_averages_weights_that_are_sharded():
    run_distributed_test(average_on_every_stage, 2)


def start_on_deepspeed():
    trainer = start(engine={"backend": "deepspeed"})
    train(trainer, range(STEPS))
    trainer.eval()
    torch.testing.assert_close(read(trainer), compute_average())
    with pytest.raises(ValueError, match=r'"engine": {"backend": "torch"}'):
        start(
            engine={"backend": "deepspeed"},
            zero_optimization={"stage": 2},
            zero_allow_untested_optimizer=True,
        )


def test_schedule_free_optimizer_with_zero_on_deepspeed_is_refused():
    run_distributed_test(start_on_deepspeed, 1)
