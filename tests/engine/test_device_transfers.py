"""Transfers between the host and a device, on a fake device that refuses CPU tensors."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import engine
from engine.checkpoint.host_copies import copy_to_host
from tests.testing import fake_device
from tests.testing.distributed import run_distributed_test


class Classifier(nn.Module):
    """A classifier that returns its loss if it gets labels."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x, y=None, options=None):
        logits = self.layers(x)
        scale = 1 if options is None else options["scale"]
        return logits if y is None else cross_entropy(logits * scale, y)


def build_model():
    torch.manual_seed(0)
    return Classifier()


def draw_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, generator=generator), torch.tensor([0, 2])


def train(trainer, steps):
    for seed in range(steps):
        trainer.backward(trainer(*draw_batch(seed)))
        trainer.step()


def read(tensors):
    return [tensor.detach().cpu().clone() for tensor in tensors]


def forward_cpu_inputs():
    with fake_device.install() as device:
        trainer = fake_device.start(build_model())
        x, y = draw_batch()
        device.counts.clear()
        loss = trainer(x, y=y, options={"scale": torch.tensor([2.0])})
        assert loss.device.type == fake_device.NAME
        assert device.counts["to device"] == 3
        expected = build_model()(x, y, {"scale": 2.0})
        assert torch.allclose(loss.detach().cpu(), expected)


def test_forward_moves_cpu_inputs_to_the_device():
    run_distributed_test(forward_cpu_inputs, 1)


def train_from_iterators():
    with fake_device.install():
        trainer = fake_device.start(build_model())
        batches = iter([draw_batch(seed) for seed in range(3)])
        losses = [trainer.train_batch(batches), trainer.train_batch(batches)]
        losses.append(trainer.eval_batch(batches))
        assert all(loss.device.type == fake_device.NAME for loss in losses)


def test_train_batch_and_eval_batch_move_cpu_batches_to_the_device():
    run_distributed_test(train_from_iterators, 1)


def train_from_a_loader():
    with fake_device.install():
        trainer = fake_device.start(build_model())
        x, y = torch.randn(8, 4), torch.randint(3, (8,))
        seen = []
        for inputs, labels in trainer.prepare(DataLoader(TensorDataset(x, y), batch_size=2)):
            trainer.backward(cross_entropy(trainer(inputs), labels))
            seen.append(trainer.step())
        assert seen == [True] * 4
        error = trainer.evaluate([(x, y)], lambda batch: cross_entropy(trainer(batch[0]), batch[1]))
        assert 0 < error < 10


def test_loader_and_evaluate_yield_inputs_and_labels_on_the_device():
    run_distributed_test(train_from_a_loader, 1)


def find_learning_rate():
    with fake_device.install():
        trainer = fake_device.start(build_model())
        before = read(trainer.module.state_dict().values())
        report = engine.lr_range_test(
            trainer,
            [draw_batch(seed) for seed in range(4)],
            loss_fn=lambda trainer, batch: cross_entropy(trainer(batch[0]), batch[1]),
            steps=20,
        )
        assert report.runs
        after = read(trainer.module.state_dict().values())
        assert all(map(torch.equal, before, after))


def test_lr_range_test_moves_cpu_batches_to_the_device():
    run_distributed_test(find_learning_rate, 1)


def take_snapshots():
    with fake_device.install() as device:
        trainer = fake_device.start(build_model())
        train(trainer, 2)
        backend, used = trainer._backend, device.allocated
        device.peak = used
        first = backend.snapshot()
        weights = read(trainer.module.state_dict().values())
        assert device.peak == used, "a snapshot must not need memory on the device"
        moments = [s["exp_avg"] for s in trainer.optimizer.state.values()]
        train(trainer, 1)
        backend.restore(first)
        assert all(map(torch.equal, weights, read(trainer.module.state_dict().values())))
        restored = [s["exp_avg"] for s in trainer.optimizer.state.values()]
        assert all(a is b for a, b in zip(moments, restored, strict=True))
        train(trainer, 1)
        addresses = [tensor.data_ptr() for tensor in first[0].values()]
        second = backend.snapshot(first)
        assert [tensor.data_ptr() for tensor in second[0].values()] == addresses
        now = read(trainer.module.parameters())
        assert all(map(torch.equal, now, list(second[0].values())))  # parameters come first


def test_snapshot_uses_no_device_memory_and_reuses_host_memory():
    run_distributed_test(take_snapshots, 1)


def save_asynchronously(directory):
    sections = {"engine": {"backend": "torch", "checkpoint": {"async": True}}}
    with fake_device.install() as device:
        trainer = fake_device.start(build_model(), **sections)
        for tag in ("first", "second"):  # the second save reuses the memory of the first one
            train(trainer, 2)
            weights = read(trainer.module.state_dict().values())
            device.counts.clear()
            trainer.save_checkpoint(directory, tag)
            assert device.counts["to host"] == device.counts["read"] == 0
            train(trainer, 1)
            trainer.wait_for_checkpoint()
            trainer.load_checkpoint(directory, tag)
            assert all(map(torch.equal, weights, read(trainer.module.state_dict().values())))


def test_async_save_does_not_wait_for_the_device_and_contains_the_state_at_the_call(tmp_path):
    run_distributed_test(save_asynchronously, 1, tmp_path)


def move_checkpoints(directory):
    def start_on_cpu():
        config = {
            "train_batch_size": 2,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "engine": {"backend": "torch"},
        }
        return engine.initialize(model=build_model(), config=config)[0]

    with fake_device.install():
        pass  # torch counts the device types in the first backward pass
    on_cpu = start_on_cpu()
    train(on_cpu, 2)
    on_cpu.save_checkpoint(directory, "cpu")
    with fake_device.install():
        on_device = fake_device.start(build_model())
        on_device.load_checkpoint(directory, "cpu")
        for state in on_device.optimizer.state.values():
            assert state["exp_avg"].device.type == fake_device.NAME
        train(on_device, 1)
        on_device.save_checkpoint(directory, "device")
    back = start_on_cpu()
    back.load_checkpoint(directory, "device")
    train(on_cpu, 1)
    for trainer in (on_cpu, back):
        train(trainer, 1)
    pairs = zip(on_cpu.module.parameters(), back.module.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def test_checkpoint_moves_from_the_cpu_to_the_device_and_back(tmp_path):
    run_distributed_test(move_checkpoints, 1, tmp_path)


class DropoutBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, *, hidden):
        return nn.functional.dropout(self.layer(hidden), 0.5)


class KeywordNet(nn.Module):
    """A model that passes tensors to its blocks as keyword arguments only."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(DropoutBlock() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(hidden=x)
        return x.pow(2).mean()


def recompute_keyword_arguments():
    with fake_device.install():
        section = {"partition_activations": False, "cpu_checkpointing": False}
        trainer = fake_device.start(KeywordNet(), activation_checkpointing=section)
        module = torch.get_device_module(fake_device.NAME)
        before = module.rng_reads
        trainer(torch.ones(2, 4))
        assert module.rng_reads - before == 2, "each block must save the random state of the device"


def test_activation_checkpointing_saves_the_device_rng_state_for_keyword_arguments():
    run_distributed_test(recompute_keyword_arguments, 1)


def test_copy_to_host_nested_values_keeps_structure_and_copies():
    value = {"a": [torch.ones(2), (torch.zeros(1), 3)], "b": {"c": "text"}}
    copied = copy_to_host(value)
    assert copied["b"] == {"c": "text"}
    assert copied["a"][1] == (torch.zeros(1), 3)
    value["a"][0].fill_(5)
    assert copied["a"][0].tolist() == [1, 1]


def test_copy_to_host_different_shape_or_dtype_does_not_reuse_memory():
    old = {"x": torch.ones(2), "y": torch.ones(2)}
    new = copy_to_host({"x": torch.ones(3), "y": torch.ones(2, dtype=torch.float64)}, old)
    assert (new["x"].shape, new["y"].dtype) == ((3,), torch.float64)
    assert new["x"] is not old["x"]
