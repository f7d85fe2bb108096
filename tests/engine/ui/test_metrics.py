"""Reading metrics while they are written, and reducing them to the points of a chart."""

import resource
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.training.monitors import CSVMonitor, Event, RunDirectories
from engine.ui.metrics import CSVMetrics, EventMetrics, find_metric_name
from engine.ui.reduction import choose_points, smooth
from engine.ui.run_page import RunPage


def write_events(monitor, samples, loss):
    monitor.write_events([Event("Train/Samples/train_loss", loss, samples)])


def test_rows_appear_as_the_monitor_writes_them(tmp_path):
    monitor, metrics = CSVMonitor(str(tmp_path / "job"), RunDirectories()), None
    for step in range(1, 6):
        write_events(monitor, 8 * step, 1 / step)
        metrics = metrics or CSVMetrics(tmp_path / "job")
        assert metrics.update() == 1.0
        samples, values = metrics.series["train_loss"]
        assert samples.tolist() == [8 * each for each in range(1, step + 1)]
        assert values.tolist() == [1 / each for each in range(1, step + 1)]


def test_incomplete_last_row_waits_for_its_end(tmp_path):
    path = tmp_path / "lr.csv"
    path.write_text("step,lr\n8,0.1\n16,0.")
    metrics = CSVMetrics(tmp_path)
    metrics.update()
    assert metrics.series["lr"].values.tolist() == [0.1]
    with path.open("a") as file:
        file.write("25\n")
    metrics.update()
    assert metrics.series["lr"].values.tolist() == [0.1, 0.25]


def test_rewound_file_of_a_resumed_run_is_read_again(tmp_path):
    directories = RunDirectories()
    monitor = CSVMonitor(str(tmp_path / "job"), directories)
    for step in range(1, 10):
        write_events(monitor, step, float(step))
    metrics = CSVMetrics(tmp_path / "job")
    metrics.update()
    monitor.rewind(4)
    for step in range(5, 8):
        write_events(monitor, step, -float(step))
    metrics.update()
    assert metrics.series["train_loss"].values.tolist() == [1, 2, 3, 4, -5, -6, -7]


def test_damaged_rows_are_left_out_and_other_files_are_ignored(tmp_path):
    (tmp_path / "lr.csv").write_bytes(b"step,lr\r\n1,2\r\nx,\r\n\xff\n3,nan\n,\n4,5,6\n7,8\n")
    (tmp_path / "data.csv").write_text("name,age\na,1\n")
    (tmp_path / "empty.csv").write_text("")
    metrics = CSVMetrics(tmp_path)
    metrics.update()
    assert list(metrics.series) == ["lr"]
    assert metrics.series["lr"].samples.tolist() == [1, 3, 7]
    assert np.array_equal(metrics.series["lr"].values, [2, np.nan, 8], equal_nan=True)


def test_deleted_file_keeps_what_was_read(tmp_path):
    path = tmp_path / "lr.csv"
    path.write_text("step,lr\n1,2\n")
    metrics = CSVMetrics(tmp_path)
    metrics.update()
    path.unlink()
    metrics.update()
    assert metrics.series["lr"].values.tolist() == [2]


def test_event_files_have_the_same_series_as_csv_files(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    metrics = None
    for step in range(1, 4):
        writer.add_scalar("Train/Samples/lr", 0.5 * step, 8 * step)
        writer.add_scalar("Validation/loss", 2.0 * step, 8 * step)
        writer.flush()
        metrics = metrics or EventMetrics(tmp_path)
        metrics.update()
        assert metrics.series["lr"].samples.tolist() == [8 * each for each in range(1, step + 1)]
        assert metrics.series["lr"].values[-1] == 0.5 * step
    assert set(metrics.series) == {"lr", "Validation_loss"}
    writer.close()


def test_metric_names_are_the_same_in_both_formats():
    assert find_metric_name("Train_Samples_lr") == find_metric_name("Train/Samples/lr") == "lr"


@pytest.mark.slow
def test_file_of_100_mb_is_read_step_by_step_in_bounded_time_and_memory(tmp_path):
    rows = 5_000_000
    samples = np.arange(1, rows + 1)
    losses = 1 / np.sqrt(samples)
    losses[rows // 3] = 100.0  # a spike that must stay visible
    lines = (f"{a},{b:.12f}\n" for a, b in zip(samples.tolist(), losses.tolist(), strict=True))
    path = tmp_path / "train_loss.csv"
    with path.open("w") as file:
        file.write("step,train_loss\n")
        file.writelines(lines)
    assert path.stat().st_size > 100_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    page = RunPage([tmp_path])
    start, requests, reply = time.monotonic(), 0, None
    while reply is None or reply.header["progress"] < 1:
        reply = page.actions["metrics"]({"axis": "samples"})
        requests += 1
    assert 1 < requests < 10
    assert time.monotonic() - start < 120  # about 5 s on an idle machine
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 1500
    x, y = reply.arrays
    assert len(x) <= 3000
    assert (x[0], x[-1]) == (1, rows)
    assert y.max() == 100.0
    again = page.actions["metrics"]({"axis": "samples", "version": reply.header["version"]})
    assert again.header["isUnchanged"]
    window = [rows / 3 - 100, rows / 3 + 100]
    x, y = page.actions["metrics"]({"axis": "samples", "window": window}).arrays
    assert len(x) == 202 or len(x) == 203
    assert y.max() == 100.0


@given(
    values=st.lists(
        st.sampled_from([0.0, 1.0, -5.0, 9.0, float("nan"), float("inf")]), max_size=80
    ),
    most=st.integers(4, 30),
)
def test_chosen_points_keep_the_extremes(values, most):
    y = np.array(values, dtype=float)
    x = np.arange(len(y), dtype=float)
    chosen = choose_points(x, y, None, most)
    assert len(chosen) <= most
    assert (np.diff(chosen) > 0).all()
    known = y[np.isfinite(y)]
    if len(known):
        shown = y[chosen][np.isfinite(y[chosen])]
        assert (shown.min(), shown.max()) == (known.min(), known.max())


def test_points_of_a_window_reach_beyond_its_edges():
    x = np.arange(100.0)
    chosen = choose_points(x, x, (10.5, 20.5), 1000)
    assert (x[chosen][0], x[chosen][-1]) == (10, 21)


@given(
    values=st.lists(st.sampled_from([1.0, 2.0, 7.0, float("nan")]), min_size=1, max_size=30),
    width=st.integers(1, 12),
)
def test_smoothed_value_is_the_mean_of_the_last_values(values, width):
    smoothed = smooth(np.array(values), width)
    for end in range(len(values)):
        window = [each for each in values[max(0, end + 1 - width) : end + 1] if each == each]
        assert smoothed[end] == pytest.approx(
            np.mean(window) if window else np.nan, nan_ok=True, rel=1e-12
        )
