"""What survives being divided among ranks, and what is refused before it hangs."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "testing" / "sharding_run.py"


def slow(*values):
    """A case that the whole suite runs, and `make test` does not."""
    return pytest.param(*values, marks=pytest.mark.slow)


def run(case, *arguments, world_size=2):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    command = [sys.executable, *torchrun, SCRIPT, case, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    "case",
    [
        slow("autocast_resume"),
        "behind",
        slow("groups"),
        slow("client_optimizer"),
        "deepspeed_resume",
        slow("one_rank_fails"),
        slow("one_rank_fails_behind"),
        "own_backward",
        slow("recompute"),
        "resume",
        slow("timeout"),
        slow("unused"),
        slow("without_frozen"),
    ],
)
def test_it_survives_being_divided(case):
    done = run(case)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        slow("strangers", "hold a tensor of shape (3,) that is none of them"),
        slow("nothing_to_wrap", "`engine.wrap` must name classes of the model's modules"),
        ("rank_0_only", "every rank must come to save_checkpoint"),
        slow("other_tags", "`tag` must be the same on all ranks, but is ['tag0', 'tag1'] instead"),
        slow(
            "wrong_config_of_one",
            "rank 1 refuses the config; if rank 0 does not, their files differ",
        ),
        ("other_config", '-   "lr": 0.001'),
    ],
)
def test_it_is_refused(case, message):
    done = run(case)
    assert done.returncode != 0
    assert message in done.stderr


def test_what_is_wrong_with_a_config_is_said_once():
    done = run("wrong_config")
    assert done.returncode != 0
    assert done.stderr.count("`train_batch_size` must be") == 1


@pytest.mark.slow
def test_the_full_state_survives_two_three_one_and_two_ranks(tmp_path):
    for world_size in (2, 3, 1, 2):
        done = run("reshard", tmp_path / "run", world_size=world_size)
        assert done.returncode == 0, done.stderr[-3000:]
