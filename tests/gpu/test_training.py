"""Training on one GPU: precisions, optimizers, compilation, memory and synchronization."""

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import engine
from tests.testing.gpu import OPTIMIZER, Machine, copy_weights, train

FP16 = {"enabled": True, "initial_scale_power": 8}
PRECISIONS = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": FP16}}
TOLERANCE = {"fp32": 0.01, "bf16": 0.1, "fp16": 0.05}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_in_each_precision_has_the_losses_of_fp32_on_the_cpu(machine, precision):
    trainer = machine.start(**PRECISIONS[precision])
    assert trainer.device == machine.device
    assert all(p.device == machine.device for p in trainer.module.parameters())
    losses = train(trainer, machine.draw_batches(10))
    on_cpu = machine.start(engine={"device": "cpu"})
    expected = train(on_cpu, machine.draw_batches(10, device="cpu"))
    assert trainer.skipped_steps == 0
    assert losses == pytest.approx(expected, rel=TOLERANCE[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_non_finite_gradients_skip_the_step_and_the_schedule(machine, precision):
    trainer = machine.start(**PRECISIONS[precision])
    before, applied, lrs = copy_weights(trainer), [], []
    for index, batch in enumerate(machine.draw_batches(6)):
        lrs.append(trainer.get_lr()[0])
        loss = trainer(*batch)
        trainer.backward(loss * float("nan") if index in {0, 3} else loss)
        applied.append(bool(trainer.step()))
        if index == 0:
            assert all(map(torch.equal, before, copy_weights(trainer)))
    assert applied == [False, True, True, False, True, True]
    assert (lrs[0], lrs[3]) == (lrs[1], lrs[4])
    assert lrs[1] < lrs[2] < lrs[3]
    assert all(torch.isfinite(weight).all() for weight in copy_weights(trainer))


def test_cpu_inputs_of_forward_train_batch_and_the_range_test_are_moved(machine):
    trainer = machine.start()
    batches = machine.draw_batches(4, device="cpu")
    expected = train(machine.start(), machine.draw_batches(2))
    assert train(trainer, batches[:2]) == pytest.approx(expected, rel=1e-4)
    assert trainer.train_batch(itertools.cycle(batches)).device == machine.device
    weights = copy_weights(trainer)
    report = engine.lr_range_test(
        trainer,
        batches,
        loss_fn=lambda trainer, batch: cross_entropy(trainer(batch[0]), batch[1]),
        steps=20,
    )
    assert report.runs
    assert all(map(torch.equal, weights, copy_weights(trainer)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_yields_batches_on_the_device_from_pinned_memory(machine, num_workers):
    inputs, labels = zip(*machine.draw_batches(4, device="cpu"), strict=True)
    dataset = TensorDataset(torch.cat(inputs), torch.cat(labels))
    trainer, _, loader, _ = engine.initialize(
        model=machine.build_model(),
        training_data=dataset,
        config={
            "train_batch_size": machine.size(32, 4),
            "optimizer": OPTIMIZER,
            "engine": {"device": machine.device.type, "dataloader": {"num_workers": num_workers}},
        },
    )
    assert loader.pin_memory is not machine.is_dry
    for batch in loader:
        assert all(each.device == machine.device for each in batch)
        trainer.backward(trainer(*batch))
        trainer.step()
    assert trainer.global_steps == 4
    trainer.destroy()


def test_copies_from_pinned_memory_do_not_synchronize(machine):
    inputs, labels = zip(*machine.draw_batches(4, device="cpu"), strict=True)
    dataset = TensorDataset(torch.cat(inputs), torch.cat(labels))
    trainer = machine.start()
    loader = DataLoader(dataset, machine.size(32, 4), pin_memory=not machine.is_dry)
    train(trainer, machine.draw_batches(2))  # the first steps allocate memory
    batches = list(loader)
    with machine.count_syncs() as found:
        for batch in batches:
            trainer.backward(trainer(*batch))
            trainer.zero_grad()
    assert not found


@pytest.mark.parametrize("clipping", [0.0, 1.0])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_step_does_not_wait_for_the_device(machine, precision, clipping):
    trainer = machine.start(gradient_clipping=clipping, **PRECISIONS[precision])
    batches = machine.draw_batches(2)
    train(trainer, batches)
    steps = 10
    with machine.count_syncs() as found:
        for batch in itertools.islice(itertools.cycle(batches), steps):
            trainer.backward(trainer(*batch))
            trainer.step()
    # The dry run is on the CPU, where steps are not deferred: each reads the gradients' norm.
    assert found.total() <= (steps if machine.is_dry else 0), found


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_fused_optimizers_take_the_same_steps_as_unfused_ones(machine, name):
    params = {"lr": 0.01} | ({"momentum": 0.9} if name == "SGD" else {})
    batches = machine.draw_batches(4)
    fused = machine.start(optimizer={"type": name, "params": params})
    assert fused.optimizer.param_groups[0]["fused"]
    train(fused, batches)
    model = machine.build_model().to(machine.device)
    params["weight_decay"] = fused.optimizer.param_groups[0]["weight_decay"]
    plain = machine.start(
        model, own_optimizer=getattr(torch.optim, name)(model.parameters(), fused=False, **params)
    )
    train(plain, batches)
    pairs = zip(copy_weights(fused), copy_weights(plain), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)


def test_capturable_optimizer_keeps_its_learning_rate_tensor(machine, tmp_path):
    model = machine.build_model().to(machine.device)
    lr = torch.tensor(0.01, device=machine.device)
    settings = {"foreach": False} if machine.is_dry else {"capturable": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **settings)
    trainer = machine.start(model, own_optimizer=optimizer)
    train(trainer, machine.draw_batches(3))
    trainer.save_checkpoint(tmp_path)
    expected = lr.item()
    train(trainer, machine.draw_batches(1))
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    trainer.load_checkpoint(tmp_path)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(expected)
    assert expected == pytest.approx(1e-4 + 9e-4 * 3 / 10, rel=1e-5)
    restored = [state["exp_avg"] for state in optimizer.state.values()]
    assert all(a is b for a, b in zip(moments, restored, strict=True))
    train(trainer, machine.draw_batches(1))


def test_state_of_the_users_optimizer_moves_with_the_model(machine):
    model = machine.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(*machine.draw_batches(1, device="cpu")[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    trainer = machine.start(model, own_optimizer=optimizer)
    assert {state["exp_avg"].device for state in optimizer.state.values()} == {machine.device}
    train(trainer, machine.draw_batches(2))


def compile_and_train(machine):
    from torch._dynamo.utils import counters

    plain = train(machine.start(), machine.draw_batches(6))
    trainer = machine.start(engine={"compile": machine.size("inductor", "aot_eager")})
    losses = train(trainer, machine.draw_batches(3))
    graphs = counters["stats"]["unique_graphs"]
    losses += train(trainer, machine.draw_batches(6)[3:])
    assert graphs > 0
    assert counters["stats"]["unique_graphs"] == graphs
    assert losses == pytest.approx(plain, rel=0.01)


def test_compiled_model_is_not_recompiled_when_the_learning_rate_changes(machine):
    machine.run(compile_and_train)


def train_with_cuda_graphs(machine):
    section = {"compile": machine.size("cudagraphs", "eager")}
    trainer = machine.start(gradient_accumulation_steps=2, engine=section)
    batches = machine.draw_batches(8)
    plain = machine.start(gradient_accumulation_steps=2)
    expected = [float(plain.train_batch(iter(batches[i : i + 2]))) for i in range(0, 8, 2)]
    losses = [float(trainer.train_batch(iter(batches[i : i + 2]))) for i in range(0, 8, 2)]
    assert losses == pytest.approx(expected, rel=0.01)


def test_losses_of_cuda_graphs_are_not_overwritten(machine):
    machine.run(train_with_cuda_graphs)


@pytest.mark.parametrize("on_host", [False, True])
def test_activation_checkpointing_drops_the_same_values_and_saves_memory(machine, on_host):
    found = {}
    for is_on in (False, True):
        section = {"activation_checkpointing": {"cpu_checkpointing": on_host}} if is_on else {}
        trainer = machine.start(machine.build_model(dropout=0.5), **section)
        batches = machine.draw_batches(3, scale=16)  # activations larger than the gradients
        train(trainer, batches[:1])
        torch.manual_seed(1)
        peak = machine.measure_peak(lambda t=trainer, b=batches: train(t, b))
        found[is_on] = peak, copy_weights(trainer)
    pairs = zip(found[False][1], found[True][1], strict=True)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)
    assert machine.is_dry or found[True][0] < found[False][0]


def test_snapshot_needs_no_memory_on_the_device(machine):
    trainer = machine.start()
    train(trainer, machine.draw_batches(2))
    backend, snapshots = trainer._backend, [None]
    size = sum(parameter.nbytes for parameter in trainer.module.parameters())
    for _ in range(2):
        peak = machine.measure_peak(lambda: snapshots.append(backend.snapshot(snapshots[-1])))
        assert peak < 0.1 * size + (1 << 20)
    weights = copy_weights(trainer)
    train(trainer, machine.draw_batches(1))
    backend.restore(snapshots[-1])
    assert all(map(torch.equal, weights, copy_weights(trainer)))


def test_out_of_memory_is_raised_and_training_continues_with_a_smaller_batch(machine, monkeypatch):
    trainer = machine.start()
    batches = machine.draw_batches(2)
    train(trainer, batches)
    if machine.is_dry:
        monkeypatch.setattr(trainer.module, "forward", run_out_of_memory)
        too_large = batches[0]
    else:
        memory = torch.cuda.get_device_properties(machine.device).total_memory
        rows = memory // (8 * 256 * 4)  # the inputs fill the GPU without being allocated
        too_large = (torch.ones(1, 1, 1, device=machine.device).expand(rows, 8, 256),)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        trainer(*too_large)
    monkeypatch.undo()
    trainer.zero_grad()
    train(trainer, batches)
    assert trainer.global_steps == 4


def run_out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB.")


def test_device_cpu_does_not_use_the_gpu(machine):
    trainer = machine.start(engine={"device": "cpu"})
    assert trainer.device.type == "cpu"
    assert Machine(is_dry=True).device == trainer.device
    train(trainer, machine.draw_batches(1, device="cpu"))
