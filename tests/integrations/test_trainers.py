"""Trainers of five libraries: an attached schedule has the values of a hand-written loop.

Each trainer trains, saves, and resumes in a new trainer. It gets the schedule as the documentation
of the library describes for PyTorch's schedulers. `scheduler.record_loss` passes the loss to AutoWU
if the trainer calls `step` without it.
"""

import functools
import itertools

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from schedules import attach

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # many warnings of the libraries
    pytest.mark.filterwarnings("error:.*schedule:UserWarning"),  # but not ours
    pytest.mark.filterwarnings("ignore:AutoWU's warmup of at most 32 steps is short"),
]

EPOCHS = 20
CUT = 6  # epochs before the run is saved; AutoWU decides later
STEPS_PER_EPOCH = 2


def decay_linearly(step):
    return 1 - step / 50


SCHEDULES = {
    "closed form": (
        "OneCycle",
        {"cycle_min_lr": 1e-3, "cycle_max_lr": 0.05, "cycle_first_step_size": 15},
    ),
    "plateau": ("ReduceLROnPlateau", {"patience": 0, "factor": 0.5, "threshold": 0.1}),
    "AutoWU": (
        "AutoWU",
        {
            "test": "robust",
            "min_lr": 1e-3,
            "max_lr": 10.0,
            "max_warmup_fraction": 0.8,
            "steps_per_epoch": STEPS_PER_EPOCH,
            "total_epochs": EPOCHS,
        },
    ),
    "LambdaLR": ("LambdaLR", {"lr_lambda": decay_linearly}),
}


def build_data(seed, is_noisy):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 4, generator=generator)
    y = x @ torch.tensor([[1.0], [2.0], [-1.0], [0.5]])
    return TensorDataset(x, y + is_noisy * 0.5 * torch.randn(8, 1, generator=generator))


TRAIN, VALID = build_data(0, is_noisy=True), build_data(1, is_noisy=False)


def make_train_loader():
    return DataLoader(TRAIN, batch_size=len(TRAIN) // STEPS_PER_EPOCH)


def compute_valid_loss(model):
    with torch.no_grad():
        return functional.mse_loss(model(VALID.tensors[0]), VALID.tensors[1])


def build_model():
    model = torch.nn.Linear(4, 1)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    return model


class Run:
    """A model with an optimizer and a schedule, and the values that each step has used."""

    def __init__(self, kind):
        self.kind = kind
        self.values = []
        self.is_plateau = kind == "plateau"
        self.model = build_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = self.attach_to(self.optimizer)

    def attach_to(self, optimizer):
        optimizer.register_step_pre_hook(self.record)
        name, params = SCHEDULES[self.kind]
        return attach(name, optimizer, **params)

    def record(self, optimizer, *_):
        (group,) = optimizer.param_groups
        self.values.append((group["lr"], group["momentum"]))


def train_in_a_loop(kind):
    run = Run(kind)
    for _ in range(EPOCHS):
        for x, y in make_train_loader():
            run.optimizer.zero_grad()
            loss = functional.mse_loss(run.model(x), y)
            loss.backward()
            run.optimizer.step()
            if not run.is_plateau:
                run.scheduler.step(*([loss] if kind == "AutoWU" else []))
        if run.is_plateau:
            run.scheduler.step(compute_valid_loss(run.model))
    return run.values


def train_with_accelerate(run, directory, epochs, is_resumed):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, loader, scheduler = accelerator.prepare(
        run.model, run.optimizer, make_train_loader(), run.scheduler
    )
    if is_resumed:
        accelerator.load_state(directory)
    for _ in range(CUT if is_resumed else 0, epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            if not run.is_plateau:
                scheduler.step(*([loss] if run.kind == "AutoWU" else []))
        if run.is_plateau:
            scheduler.step(compute_valid_loss(model))
    accelerator.save_state(directory)


def train_with_transformers(run, directory, epochs, is_resumed):
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = run.model

        def forward(self, x, labels):
            y = self.layer(x)
            return {"loss": functional.mse_loss(y, labels), "logits": y}

    class SequentialTrainer(Trainer):
        def _get_train_sampler(self, *_):
            return None

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.lr_scheduler.record_loss(loss)
            return loss

    arguments = TrainingArguments(
        output_dir=directory,
        num_train_epochs=epochs,
        per_device_train_batch_size=len(TRAIN) // STEPS_PER_EPOCH,
        per_device_eval_batch_size=len(VALID),
        eval_strategy="steps",
        eval_steps=STEPS_PER_EPOCH,
        metric_for_best_model="eval_loss",
        save_strategy="steps",
        save_steps=CUT * STEPS_PER_EPOCH,
        max_grad_norm=0.0,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    train, valid = (
        [{"x": x, "labels": y} for x, y in zip(*data.tensors, strict=True)]
        for data in (TRAIN, VALID)
    )
    trainer = SequentialTrainer(
        model=Model(),
        args=arguments,
        train_dataset=train,
        eval_dataset=valid,
        optimizers=(run.optimizer, run.scheduler),
    )
    trainer.train(resume_from_checkpoint=is_resumed)


def train_with_lightning(run, directory, epochs, is_resumed):
    import pytorch_lightning as lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = run.model

        def training_step(self, batch, _):
            loss = functional.mse_loss(self.model(batch[0]), batch[1])
            self.lr_schedulers().record_loss(loss)
            return loss

        def validation_step(self, batch, _):
            self.log("val_loss", functional.mse_loss(self.model(batch[0]), batch[1]))

        def configure_optimizers(self):
            scheduler = {
                "scheduler": run.scheduler,
                "interval": "epoch" if run.is_plateau else "step",
                "monitor": "val_loss",
            }
            return {"optimizer": run.optimizer, "lr_scheduler": scheduler}

    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=directory,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    file = directory / "last.ckpt"
    valid = DataLoader(VALID, batch_size=len(VALID))
    trainer.fit(Module(), make_train_loader(), valid, ckpt_path=file if is_resumed else None)
    trainer.save_checkpoint(file)


def train_with_ignite(run, directory, epochs, is_resumed):
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint, DiskSaver, LRScheduler

    def update(_, batch):
        run.optimizer.zero_grad()
        loss = functional.mse_loss(run.model(batch[0]), batch[1])
        loss.backward()
        run.optimizer.step()
        return loss

    trainer, handler = Engine(update), run.scheduler
    if run.is_plateau:
        trainer.add_event_handler(
            Events.EPOCH_COMPLETED, lambda: run.scheduler.step(compute_valid_loss(run.model))
        )
    elif run.kind == "AutoWU":
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine: run.scheduler.step(engine.state.output)
        )
    else:
        handler = LRScheduler(run.scheduler)
        trainer.add_event_handler(Events.ITERATION_STARTED, handler)
    objects = {
        "trainer": trainer,
        "model": run.model,
        "optimizer": run.optimizer,
        "scheduler": handler,
    }
    if is_resumed:
        (file,) = directory.glob("*.pt")
        Checkpoint.load_objects(objects, torch.load(file))
    saver = Checkpoint(objects, DiskSaver(directory, require_empty=False))
    trainer.add_event_handler(Events.COMPLETED, saver)
    trainer.run(make_train_loader(), max_epochs=epochs)


def train_with_skorch(run, directory, epochs, is_resumed):
    import skorch.callbacks
    import skorch.helper

    class RecordLoss(skorch.callbacks.Callback):
        def on_batch_end(self, net, training, loss, **_):
            if training:
                run.scheduler.record_loss(loss)

    def policy(optimizer, last_epoch):
        # Skorch does not save the state of schedulers, and `last_epoch` does not count batches.
        del last_epoch
        run.scheduler = run.attach_to(optimizer)
        if is_resumed:
            run.scheduler.load_state_dict(torch.load(directory / "scheduler.pt"))
        return run.scheduler

    net = skorch.NeuralNetRegressor(
        run.model,
        optimizer=torch.optim.SGD,
        optimizer__momentum=0.9,
        lr=0.1,
        batch_size=len(TRAIN) // STEPS_PER_EPOCH,
        iterator_valid__batch_size=len(VALID),
        train_split=skorch.helper.predefined_split(VALID),
        callbacks=[
            ("record_loss", RecordLoss()),
            (
                "schedule",
                skorch.callbacks.LRScheduler(
                    policy,
                    monitor="valid_loss",
                    step_every="epoch" if run.is_plateau else "batch",
                ),
            ),
        ],
        verbose=0,
    ).initialize()
    files = {name: directory / name for name in ("f_params", "f_optimizer", "f_history")}
    if is_resumed:
        net.load_params(**files)
    net.partial_fit(TRAIN, epochs=epochs - len(net.history))
    net.save_params(**files)
    torch.save(run.scheduler.state_dict(), directory / "scheduler.pt")


TRAINERS = {
    "transformers": train_with_transformers,
    "accelerate": train_with_accelerate,
    "lightning": train_with_lightning,
    "ignite": train_with_ignite,
    "skorch": train_with_skorch,
}


@functools.cache
def find_expected_values(kind):
    return train_in_a_loop(kind)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(
    "library",
    [
        pytest.param("transformers", marks=pytest.mark.slow),
        "accelerate",
        "lightning",
        "ignite",
        "skorch",
    ],
)
def test_trainer_saved_and_resumed_has_the_values_of_a_loop(library, kind, tmp_path):
    expected = find_expected_values(kind)
    values = []
    for epochs, is_resumed in ((CUT, False), (EPOCHS, True)):
        run = Run(kind)
        TRAINERS[library](run, tmp_path, epochs, is_resumed)
        values += run.values
    assert values == expected


def test_values_of_the_loop_depend_on_the_losses():
    """Otherwise, the comparison could not fail if a trainer passes another loss."""
    plateau = find_expected_values("plateau")
    reductions = sum(a != b for a, b in itertools.pairwise(plateau))
    assert 2 <= reductions < EPOCHS - 2
    lrs = [lr for lr, _ in find_expected_values("AutoWU")]
    peak = next(k for k in range(1, len(lrs)) if lrs[k] < lrs[k - 1])
    assert CUT * STEPS_PER_EPOCH < peak < 32, "the warmup ends early"
