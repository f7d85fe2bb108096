"""Checkpoints on a GPU: round trips, asynchronous saves and the random state."""

import pytest
import torch

from engine.training.rng import get_rng_state, set_rng_state
from tests.testing.gpu import copy_weights, train


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("precision", [{}, {"fp16": {"enabled": True, "initial_scale_power": 8}}])
def test_resumed_run_takes_the_same_steps(machine, tmp_path, is_async, precision):
    batches = machine.draw_batches(5)
    section = {"checkpoint": {"async": is_async}}
    trainer = machine.start(engine=section, **precision)
    train(trainer, batches[:3])
    saved = copy_weights(trainer)
    trainer.save_checkpoint(tmp_path)
    expected = train(trainer, batches[3:])  # changes the weights while the files are written
    trainer.wait_for_checkpoint()
    resumed = machine.start(engine=section, **precision)
    resumed.load_checkpoint(tmp_path)
    assert all(map(torch.equal, saved, copy_weights(resumed)))
    assert train(resumed, batches[3:]) == pytest.approx(expected, rel=1e-5)
    pairs = zip(copy_weights(trainer), copy_weights(resumed), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)
    trainer.destroy()
    resumed.destroy()


def test_async_save_starts_copies_without_waiting_for_the_device(machine, tmp_path):
    trainer = machine.start(engine={"checkpoint": {"async": True}})
    train(trainer, machine.draw_batches(2))
    trainer.save_checkpoint(tmp_path, "first")  # allocates the pinned memory
    trainer.wait_for_checkpoint()
    backend, directory = trainer._backend, tmp_path / "files"
    directory.mkdir()
    saver = trainer._checkpointer.async_saver
    with machine.count_syncs() as found:
        written = backend.save_async(directory, None, saver.buffers)
    written.result()
    assert not found
    tensors = [each for each in saver.buffers["model"].values() if each.numel()]
    assert all(each.is_pinned() is not machine.is_dry for each in tensors)
    trainer.destroy()


@pytest.mark.parametrize("first", ["cpu", "device"])
def test_checkpoint_moves_between_the_cpu_and_the_device(machine, tmp_path, first):
    devices = ["cpu", machine.device.type][:: 1 if first == "cpu" else -1]
    saving, loading = (machine.start(engine={"device": device}) for device in devices)
    train(saving, machine.draw_batches(3, device=devices[0]))
    saving.save_checkpoint(tmp_path)
    loading.load_checkpoint(tmp_path)
    assert all(map(torch.equal, copy_weights(saving), copy_weights(loading)))
    for state in loading.optimizer.state.values():
        assert {each.device.type for each in state.values()} == {devices[1]}
    losses = [
        train(trainer, machine.draw_batches(2, seed=1, device=device))
        for trainer, device in zip((saving, loading), devices, strict=True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_capturable_checkpoint_resumes_with_an_optimizer_that_is_not(machine, tmp_path):
    def start(*, capturable):
        model = machine.build_model().to(machine.device)
        settings = {"capturable": True} if capturable and not machine.is_dry else {}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **settings)
        return machine.start(model, own_optimizer=optimizer)

    trainer = start(capturable=True)
    train(trainer, machine.draw_batches(2))
    trainer.save_checkpoint(tmp_path)
    other = start(capturable=False)
    other.load_checkpoint(tmp_path)
    assert not other.optimizer.param_groups[0]["capturable"]
    expected = train(trainer, machine.draw_batches(2, seed=1))
    assert train(other, machine.draw_batches(2, seed=1)) == pytest.approx(expected, rel=1e-4)


def test_random_state_of_the_device_is_saved_and_restored(machine, tmp_path):
    torch.rand(1, device=machine.device)  # starts CUDA
    state = get_rng_state()
    assert ("cuda" in state) is not machine.is_dry
    first = torch.rand(4, device=machine.device)
    set_rng_state(state)
    assert torch.equal(torch.rand(4, device=machine.device), first)
    trainer = machine.start(machine.build_model(dropout=0.5))
    train(trainer, machine.draw_batches(2))
    trainer.save_checkpoint(tmp_path)
    expected = torch.rand(4, device=machine.device)
    trainer.load_checkpoint(tmp_path)
    assert torch.equal(torch.rand(4, device=machine.device), expected)


def test_evaluation_does_not_change_the_random_state(machine):
    trainer = machine.start(machine.build_model(dropout=0.5))
    before = get_rng_state()

    def evaluate(batch):
        torch.rand(4, device=machine.device)
        return trainer(*batch)

    trainer.evaluate(machine.draw_batches(2, device="cpu"), evaluate)
    after = get_rng_state()
    assert torch.equal(before["torch"], after["torch"])
    assert machine.is_dry or torch.equal(before["cuda"], after["cuda"])
