"""Inject faults, such as a full disk, a malicious file or a signal, into runs and commands.

Each fault is caused by a shell script that runs in an empty directory. `benchmarks/fault_table.py`
runs all scripts and prints each script's last line of output, exit status and run time in a table.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["run_faults"]

ROOT = Path(__file__).parent.parent
_MAX_LENGTH = 220
_OF_SHELL = re.compile(r"(environment: line \d+: )?\s*(\d+ )?(Done|Killed|Terminated)\b.*")
"""Pattern that matches the lines in which the shell reports that a process has exited."""
_PRELUDE = """
# `python` runs the imports in $IMPORTS, and then the script that it reads from standard input.
onecycle() { "$PYTHON" -m engine.cli.main "$@"; }
python() { { echo "$IMPORTS"; cat; } | "$PYTHON" -; }
launch() { exec "$PYTHON" -m engine.cli.main launch --no-preflight "$@"; }
"""
_IMPORTS = """
import json, os, signal, sys, threading, time
from pathlib import Path
import torch, engine
from tests.engine.checkpoint.test_pruning import list_tags, start, train
"""
_FULL_DISK = """
mkdir disk
if ! mount -t tmpfs -o size=3m tmpfs disk; then echo SKIPPED: a tmpfs cannot be mounted; exit; fi
trap 'umount disk' EXIT
python <<'END'
from pathlib import Path
config = {"train_batch_size": 4, "optimizer": {"type": "AdamW"}}
config["engine"] = {"checkpoint": {"dir": "disk", "every": 1, "async": ASYNC}}
trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(550, 550))
for step in range(8):
    trainer.backward(trainer(torch.ones(4, 550)).mean())
    trainer.step()
END
status=$?
echo "files left: $(ls -A disk | wc -l)"
exit $status
"""


class Fault(NamedTuple):
    """The name of a fault, and the shell script that causes it."""

    name: str
    script: str


FAULTS = (
    Fault("the disk fills up while saving", _FULL_DISK.replace("ASYNC", "False")),
    Fault("the disk fills up while saving in the background", _FULL_DISK.replace("ASYNC", "True")),
    Fault(
        "the clock is set back by an hour, with `keep: 1`",
        """python <<'END'
import datetime as dt
from unittest import mock
from engine.checkpoint import manager
trainer = train(start(Path("run")), 4)
clock = mock.Mock()
clock.now.return_value = dt.datetime.now(dt.timezone.utc) - dt.timedelta(hours=1)
manager.dt.datetime = clock
train(trainer, 6)
print("checkpoints left:", *list_tags(Path("run")))
END""",
    ),
    Fault(
        "a link to a foreign checkpoint and a tag `best` in the directory, with `keep: 1`",
        """python <<'END'
train(start(Path("foreign")), 2)
Path("run").mkdir()
Path("run/init").symlink_to(Path("foreign/global_step2").absolute())
trainer = train(start(Path("run"), resume="never"), 2)
trainer.save_checkpoint("run", tag="best")
train(trainer, 4)
trainer.load_checkpoint("foreign")
print("checkpoints left:", *list_tags(Path("run")), "and the foreign one")
END""",
    ),
    Fault(
        "a parameter without gradients, a NumPy learning rate and tensors in `get_extra_state`",
        """python <<'END'
import numpy as np
class Model(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 1)
        self.unused = torch.nn.Parameter(torch.ones(1))
    def get_extra_state(self): return {"seen": torch.ones(2)}
    def set_extra_state(self, state): assert state["seen"].sum() == 2
def build():
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=np.float64(0.1))
    return engine.initialize(config={"train_batch_size": 4}, model=model, optimizer=optimizer)[0]
train(build(), 1).save_checkpoint("run")
trainer = build()
trainer.load_checkpoint("run")
print("loaded step", trainer.global_steps)
END""",
    ),
    Fault(
        "a second job starts in the checkpoint directory of a running one",
        """python <<'END' &
train(start(Path("run")), 2)
Path("running").write_text(str(os.getpid()))
time.sleep(120)
END
while ! test -s running; do sleep 0.1; done
python <<'END'
train(start(Path("run"), resume="never"), 2)
END
status=$?
kill -KILL "$(cat running)"; wait
exit $status""",
    ),
    Fault(
        "`checkpoint export -o` names an existing file",
        """python <<'END'
train(start(Path("run")), 2)
END
echo precious > weights
onecycle checkpoint export run -o weights""",
    ),
    Fault(
        "a param group is added before a resume",
        """python <<'END'
config = {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
config["engine"] = {"checkpoint": {"dir": "run", "every": 2}}
for groups in (None, [{"params": "weight", "lr": 0.1}, {"params": "bias", "lr": 0.2}]):
    model = torch.nn.Linear(2, 1)
    parameters = groups and [{**each, "params": getattr(model, each["params"])} for each in groups]
    trainer, *_ = engine.initialize(config=config, model=model, model_parameters=parameters)
    train(trainer, 2)
END""",
    ),
    Fault(
        "a save after 2 of 4 micro-batches",
        """python <<'END'
config = {"train_batch_size": 16, "gradient_accumulation_steps": 4, "optimizer": {"type": "SGD"}}
def build():
    torch.manual_seed(0)
    return engine.initialize(config=config, model=torch.nn.Linear(2, 1))[0]
trainer, resumed = build(), build()
train(trainer, 2).save_checkpoint("run")
resumed.load_checkpoint("run")
train(trainer, 2)
train(resumed, 4)  # a resume repeats the micro-batches of the incomplete step
is_equal = torch.equal(trainer.module.weight, resumed.module.weight)
print("steps:", trainer.global_steps, resumed.global_steps, "equal weights:", is_equal)
END""",
    ),
    Fault(
        "a killed run has written CSV rows for steps after its last checkpoint",
        """for steps in 3 4; do
STEPS=$steps python <<'END'
config = {"train_batch_size": 4, "optimizer": {"type": "SGD"}}
config["csv_monitor"] = {"enabled": True, "output_path": ".", "job_name": "csv"}
config["engine"] = {"checkpoint": {"dir": "run", "every": 2}}
trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(2, 1))
train(trainer, int(os.environ["STEPS"]) - trainer.global_steps)
os._exit(0)
END
done
echo "samples in the file: $(cut -d , -f 1 csv/Train_Samples_lr.csv | tail -n +2 | xargs)" """,
    ),
    Fault(
        "rank 1 of 2 does not see the newest checkpoint",
        """cat > both.py <<'END'
import os, shutil, torch, engine
from pathlib import Path
def start():
    config = {"train_batch_size": 4, "optimizer": {"type": "SGD"}}
    config["engine"] = {"checkpoint": {"dir": "run", "every": 2}}
    return engine.initialize(config=config, model=torch.nn.Linear(2, 1))[0]
trainer = start()
for step in range(4):
    trainer.backward(trainer(torch.ones(2, 2)).mean())
    trainer.step()
trainer.destroy()
if trainer.global_rank == 1:
    shutil.copytree("run", "other/run", ignore=shutil.ignore_patterns(".lock"))
    shutil.rmtree("other/run/global_step4")
    os.chdir("other")
torch.distributed.barrier()
print("resumed at step", start().global_steps)
END
"$PYTHON" -m engine.cli.main launch --no-preflight --nproc 2 both.py > printed 2>&1; status=$?
grep -o "CheckpointError: .*\\|resumed at.*" printed | tail -1; exit $status""",
    ),
    Fault(
        "a shard whose content is invalid but whose hash matches the manifest",
        """python <<'END'
from engine.checkpoint.hashes import describe_files
train(start(Path("run"), keep=2), 4)
[shard] = Path("run/global_step4").glob("shard.*")
shard.write_bytes(b"\\xff" * 100)
path = shard.parent / "manifest.json"
text = json.loads(path.read_text())
text["files"] |= describe_files([shard], shard.parent)
del text["checksum"]
path.write_text(json.dumps(text))
start(Path("run"), keep=2)
END""",
    ),
    Fault(
        "a bit of the newest manifest is flipped",
        """python <<'END'
train(start(Path("run"), keep=2), 4)
path = Path("run/global_step4/manifest.json")
text = bytearray(path.read_bytes())
text[text.index(b"world_size") + 13] ^= 1
path.write_bytes(text)
print("resumed at step", start(Path("run"), keep=2).global_steps)
END""",
    ),
    Fault(
        "two configs: one sets `lr_lambda` to `os:_exit`, the other is invalid",
        """cat > a.json <<'END'
{"train_batch_size": 8, "scheduler": {"type": "LambdaLR", "params": {"lr_lambda": "os:_exit"}}}
END
echo '{"train_batch_size": -1}' > b.json
onecycle validate a.json b.json > printed; status=$?
grep "^a.json: [v0-9]\\|^b.json: [v0-9]" printed | tr '\\n' ' '; exit $status""",
    ),
    Fault(
        "a DeepSpeed checkpoint with matching hashes contains code",
        """python <<'END'
from tests.engine.checkpoint.test_checkpoint import Bomb
config = {"train_batch_size": 4, "optimizer": {"type": "AdamW"}}
config["engine"] = {"backend": "deepspeed"}
trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(2, 1))
train(trainer, 1).save_checkpoint("run")
[tag] = Path("run").glob("global_step*")
target = next(path for path in tag.rglob("*.pt") if "model" in path.name)
torch.save(Bomb(), target)
from engine.checkpoint import manifest
from engine.checkpoint.hashes import describe_files
text = json.loads((tag / "manifest.json").read_text())
text["files"] |= describe_files([target], tag)
text.pop("checksum", None)
(tag / "manifest.json").write_text(json.dumps(text))
trainer.load_checkpoint("run")
END""",
    ),
    Fault(
        "`--write-sbatch` with shell commands in option values, followed by a run of the script",
        """mkdir bin; printf '#!/bin/sh\\n' > bin/srun; cp bin/srun bin/scontrol
chmod +x bin/*; touch train.py
onecycle launch --write-sbatch job --nproc 1 --log-dir '$(touch pwned)' \\
    --slurm-opt 'comment=`touch pwned`' train.py > printed || { cat printed; exit 9; }
PATH=$PWD/bin:$PATH timeout 20 bash job > printed 2>&1
echo "mode of the script: $(stat -c %a job), commands run: $(ls pwned 2> /dev/null | wc -l)" """,
    ),
    Fault(
        "keys with escape sequences and workflow commands",
        r"""printf '{"\\u001b[31mred": 1, "a\\n::error::b": 2, "train_batch_size": 1}' > a.json
onecycle validate --format github a.json > printed; status=$?
echo "control characters: $(tr -d '\n[:print:]' < printed | wc -c)," \
    "commands: $(grep -c '^::error::b' printed)"
exit $status""",
    ),
    Fault(
        "the host name `-oProxyCommand=touch pwned` in a hostfile",
        """echo '-oProxyCommand=touch${IFS}pwned slots=1' > hosts; touch train.py
onecycle launch --hostfile hosts train.py""",
    ),
    Fault(
        "an exception on rank 1 of 2",
        'launch --nproc 2 "$ROOT/tests/testing/failing_rank.py" loop torch',
    ),
    Fault(
        "nobody reads the launcher's output for 45 seconds",
        """cat > quiet.py <<'END'
import time
time.sleep(50)
END
mkfifo pipe
(sleep 45; cat) < pipe &
"$PYTHON" -m engine.cli.main launch --no-preflight --nproc 1 quiet.py > pipe 2>&1""",
    ),
    Fault(
        "the launcher is stopped for 45 seconds and continued",
        """cat > quiet.py <<'END'
import time
time.sleep(50)
END
"$PYTHON" -m engine.cli.main launch --no-preflight --nproc 1 quiet.py & pid=$!
sleep 4; kill -STOP $pid; sleep 45; kill -CONT $pid
wait $pid""",
    ),
    Fault(
        "SIGTERM, and again after 6 seconds, during an evaluation that hangs",
        """python <<'END' &
trainer = train(start(Path("run")), 1)
Path("evaluating").write_text(str(os.getpid()))
while True: time.sleep(0.1)
END
while ! test -s evaluating; do sleep 0.1; done
kill -TERM "$(cat evaluating)"; sleep 6; kill -TERM "$(cat evaluating)"
wait %1""",
    ),
    Fault(
        "`plot` of CyclicLR with `scale_schedule_ratio` 3",
        """cat > a.json <<'END'
{"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
 "scheduler": {"type": "CyclicLR", "params": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 15}},
 "engine": {"max_duration": 100, "scale_schedule_ratio": 3}}
END
onecycle plot a.json""",
    ),
    Fault(
        "`plot` of 10^12 steps",
        """cat > a.json <<'END'
{"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
 "scheduler": {"type": "CosineAnnealingWarmRestarts", "params": {"T_0": 10, "T_mult": 3}},
 "engine": {"max_duration": 1000000000000}}
END
onecycle plot a.json""",
    ),
    Fault(
        "60,000 unknown keys",
        """"$PYTHON" -c 'print({f"k{n}": 1 for n in range(60000)})' | tr "'" '"' > a.json
onecycle validate a.json > printed; status=$?
tail -1 printed; exit $status""",
    ),
    Fault("a FIFO in place of the config", "mkfifo a.json; onecycle validate a.json"),
    Fault(
        "a stale build lock blocks Muon on DeepSpeed and is deleted 30 seconds later",
        """export TORCH_EXTENSIONS_DIR=$PWD/built
mkdir -p built/fused_adam; touch built/fused_adam/lock
touch printed
(while ! grep -q fused_adam/lock printed; do sleep 0.1; done; sleep 30; rm built/fused_adam/lock) &
python <<'END' > printed 2>&1
config = {"train_batch_size": 4, "optimizer": {"type": "Muon", "params": {"lr": 0.01}}}
config |= {"zero_optimization": {"stage": 1}, "engine": {"backend": "deepspeed"}}
engine.initialize(config=config, model=torch.nn.Linear(2, 1))
END
status=$?
sed -i '/built.fused_adam.lock is/!d' printed; cat printed
exit $status""",
    ),
    Fault(
        "a duration of `1e400ep`",
        """cat > a.json <<'END'
{"train_batch_size": 8, "optimizer": {"type": "SGD"}, "engine": {"max_duration": "1e400ep"}}
END
onecycle validate a.json > printed; status=$?
grep -o "\\(error\\|warning\\)\\[.*" printed | tr '\\n' ' '; exit $status""",
    ),
    Fault(
        "a manifest that is valid JSON but has values of the wrong types",
        """python <<'END'
train(start(Path("run"), keep=2), 4)
Path("run/global_step4/manifest.json").write_text('{"files": [1], "step": {}, "sha256": 7}')
print("resumed at step", start(Path("run"), keep=2).global_steps)
END
onecycle checkpoint ls run""",
    ),
    Fault(
        "`nesterov` without momentum, and an unknown compiler",
        """cat > a.json <<'END'
{"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.1, "nesterov": true}},
 "engine": {"compile": "induktor"}}
END
onecycle validate a.json > printed; status=$?
grep -o "\\(error\\|warning\\)\\[.*" printed | tr '\\n' ' '; exit $status""",
    ),
    Fault(
        "a hostfile that starts with a byte order mark, and `--ssh-opt=-oProxyJump=gate`",
        r"""printf '\xef\xbb\xbfnode1 slots=1\nnode2 slots=1\n' > hosts; touch train.py
onecycle launch --hostfile hosts --ssh-opt=-oProxyJump=gate --dry-run --no-preflight \
    train.py > printed; status=$?
head -1 printed; exit $status""",
    ),
    Fault(
        "an option of torchrun that `onecycle launch` does not have",
        "touch train.py; onecycle launch --rdzv-endpoint=node1:29400 train.py",
    ),
    Fault(
        "the launcher is killed while torchrun's temporary directories exist",
        """mkdir tmp; export TMPDIR=$PWD/tmp; echo 'import time; time.sleep(60)' > train.py
"$PYTHON" -m engine.cli.main launch --no-preflight --nproc 2 --grace 1 train.py & pid=$!
while ! ls tmp/torchelastic_* > /dev/null 2>&1; do sleep 0.1; done
sleep 2; kill -KILL $pid; sleep 8
echo "torchelastic directories left: $(ls -d tmp/torchelastic_* 2> /dev/null | wc -l)" """,
    ),
    Fault(
        "200 engines with TensorBoard in one process",
        """python <<'END'
import logging
logging.disable(logging.ERROR)
for number in range(200):
    section = {"enabled": True, "output_path": ".", "job_name": str(number)}
    config = {"train_batch_size": 4, "optimizer": {"type": "SGD"}, "tensorboard": section}
    trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(2, 1))
    train(trainer, 1).destroy()
print("threads left:", threading.active_count() - 1)
END""",
    ),
    Fault(
        "60,000 steps of LambdaLR, CyclicLR, CosineAnnealingWarmRestarts and LRRangeTest",
        """python <<'END'
import schedules, warnings
warnings.simplefilter("ignore")
def read_memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
cases = {
    "LambdaLR": {"lr_lambda": "math:erfc"},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 15},
    "CosineAnnealingWarmRestarts": {"T_0": 10},
    "LRRangeTest": {"lr_range_test_min_lr": 1e-4, "lr_range_test_step_size": 5},
}
grown = []
for name, params in cases.items():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    binder = schedules.attach(name, optimizer, **params)
    for step in range(62000):
        if step == 2000: before = read_memory()
        binder.step()
    grown.append(read_memory() - before)
print("KiB of memory added:", *grown)
END""",
    ),
    Fault(
        "10,000 param groups",
        """python <<'END'
import logging
from tests.engine import test_many_groups as many
logging.disable(logging.ERROR)
def measure(name, function):
    before = time.process_time()
    result = function()
    print(name, f"{time.process_time() - before:.1f}", end="; ")
    return result
print("seconds of CPU time", end=": ")
trainer = measure("start", lambda: many.start(10_000))
trainer.backward(trainer(torch.ones(4, 1)))
trainer.step()
measure("save", lambda: trainer.save_checkpoint("run"))
other = many.start(10_000)
measure("load", lambda: other.load_checkpoint("run"))
END""",
    ),
)


def run_faults(only: str = "") -> Iterator[tuple[str, str, int, float]]:
    """Run the script of each fault whose name contains ``only``.

    Yields:
        Tuple ``(name, last_line_of_output, exit_status, seconds)``.
    """
    for fault in FAULTS:
        if only in fault.name:
            with tempfile.TemporaryDirectory() as directory:
                yield fault.name, *_run(fault.script, directory)


def _run(script: str, directory: str) -> tuple[str, int, float]:
    own = {
        "IMPORTS": _IMPORTS,
        "PYTHON": sys.executable,
        "ROOT": str(ROOT),
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
    }
    before = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", _PRELUDE + script],
        cwd=directory,
        env=os.environ | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    seconds = time.monotonic() - before
    lines = [
        line for line in done.stdout.splitlines() if line.strip() and not _OF_SHELL.fullmatch(line)
    ]
    last = lines[-1].replace(f"{directory}/", "").replace(directory, "…") if lines else "(nothing)"
    shown = last if len(last) <= _MAX_LENGTH else f"{last[:_MAX_LENGTH]} …"
    return shown, done.returncode, seconds
