"""The options of `onecycle launch`, and those of torchrun and deepspeed that it accepts."""

import json
import time

import pytest
import torch

from engine.launch.torchrun import LOCAL_RANK_ARGUMENT
from tests.engine.launch.test_plan import launch


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "No script was given"),
        (["missing.py"], "missing.py: script not found"),
        (["--hostfile", "none", __file__], "none: No such file"),
        (["--nnodes", "2", __file__], "with srun, or start torchrun on every host"),
        (["--nnodes", "2:x", __file__], "must be an integer >= 1 or a range MIN:MAX"),
        (["--nnodes", "3:2", "--write-sbatch", "job", __file__], "must be MIN:MAX with MIN <= MAX"),
        (["--nproc", "0", __file__], "`--nproc` must be an integer >= 1, `auto`, `gpu` or `cpu`"),
        (["--rejoin", __file__], "`--rejoin` requires `--hostfile`"),
        (["--port", "70000", __file__], "`--port` must be between 0 and 65535, got 70000"),
        (["--slurm", "--include", "node0", __file__], "`--include` has no effect in a Slurm job"),
        (["--include", "node0", __file__], "unknown host 'node0'. Use one of localhost"),
        (["--slurm", "--standalone", __file__], "`--standalone` starts all ranks on this machine"),
        (["--ssh-opt=-v", __file__], "`--ssh-opt` requires `--hostfile`"),
        (["--slurm-opt", "a=b", __file__], "`--slurm-opt` requires `--slurm`"),
        (["--slurm", "--console", "all", __file__], "`--console` has no effect in a Slurm job"),
        (["--slurm", "--pass-env", "W*", __file__], "`--pass-env` has no effect in a Slurm job"),
        (["--slurm", "--hostfile", "h", __file__], "`--hostfile` cannot be combined"),
        (["--env", "NOVALUE", __file__], "must have the form NAME=VALUE"),
        (["--env", "A;touch x=1", __file__], "form NAME=VALUE, got 'A;touch x'"),
        (
            ["--slurm", "--slurm-opt", "comment=a\ntouch x", __file__],
            "one line of the form NAME=VALUE",
        ),
        (["--slurm", "--slurm-opt", "a b=c", __file__], "the long name of an sbatch option"),
        (["--set", "fp16", __file__], "`--set` must have the form KEY=VALUE, got 'fp16'"),
        (["--nproc", "none", __file__], "`auto`, `gpu` or `cpu`, got 'none'"),
    ],
)
def test_launch_wrong_usage_exits_with_2(arguments, message):
    status, output = launch("--dry-run", *arguments)
    assert status == 2
    assert message in output


def test_launch_set_changes_the_config_that_is_validated_and_reaches_the_ranks(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text('{"train_batch_size": 8}')
    arguments = ("--dry-run", "--json", "--nproc", 2, "--set", "fp16.loss_scale=2")
    status, output = launch(*arguments, "--set", "train_batch_size=16", __file__, path)
    assert status == 0, output
    variables = json.loads(output)["nodes"][0]["env"]
    assert json.loads(variables["ONECYCLE_SET"]) == ["fp16.loss_scale=2", "train_batch_size=16"]
    status, output = launch(*arguments, "--set", "train_batch_size=7", __file__, path)
    assert status == 1
    assert "The value was set by --set." in output


def test_launch_json_without_dry_run_exits_with_2():
    status, output = launch("--json", __file__)
    assert status == 2
    assert "`--json` requires `--dry-run`" in output


def test_launch_ssh_options_reach_ssh(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("node0 slots=1\n")
    options = ("--ssh-opt", "ProxyJump=gate", "--ssh-opt=-oUser=me", "--ssh-opt=-i my key")
    arguments = ("--hostfile", path, "--dry-run", "--json", *options, "--ssh_port", 2222)
    status, output = launch(*arguments, __file__)
    assert status == 0, output
    ssh = json.loads(output)["nodes"][0]["transport"]
    user = ["-o", "ProxyJump=gate", "-oUser=me", "-i", "my key", "-o", "Port=2222"]
    assert ssh[2 : 2 + len(user)] == user
    assert ssh[-2] == "node0"


@pytest.mark.parametrize(
    "foreign, own",
    [
        ("--num_gpus 2 --num_nodes 1", "--nproc 2 --nnodes 1"),
        ("--nproc_per_node=2 --nnodes=1 --standalone --no_local_rank", "--nproc 2"),
        ("--nproc-per-node 2 --rdzv-backend c10d --max_restarts 1", "--nproc 2 --max-restarts 1"),
        ("--master_port 7000", "--port 7000"),
        ("-H {hosts} -i node0 --force_multi", "--hostfile {hosts} --include node0"),
        ("--hostfile {hosts} -e node0:0 --no_ssh_check", "--hostfile {hosts} --exclude node0:0"),
        ("--hostfile {hosts} --master_addr 10.1.1.1 --shutdown_timeout 9",
         "--hostfile {hosts} --master-addr 10.1.1.1 --grace 9"),
        ("--num_gpus 1 --log_dir x --bind_cores_to_rank", "--nproc 1 --log-dir x --bind-cores"),
    ],
)  # fmt: skip
def test_launch_options_of_torchrun_and_deepspeed_mean_the_same(
    tmp_path, monkeypatch, foreign, own
):
    monkeypatch.setattr(time, "time", lambda: 0.0)  # it is part of the name of the job
    hosts = tmp_path / "hosts"
    hosts.write_text("node0 slots=2\nnode1 slots=2\n")
    first, second = (
        launch("--dry-run", "--json", *words.format(hosts=hosts).split(), __file__)
        for words in (foreign, own)
    )
    assert first[0] == 0, first
    assert first == second


@pytest.mark.parametrize(
    "option, advice",
    [
        ("--node_rank", "starts the script on all hosts from one machine"),
        ("--rdzv-endpoint", "start torchrun on each host"),
        ("--launcher", "Use `--hostfile` to launch over ssh, or `--slurm`"),
        ("--venv_script", "Set the interpreter of the virtual environment with `--python`"),
        ("--autotuning", "start the script with torchrun or deepspeed"),
    ],
)
@pytest.mark.parametrize("form", ["{} x", "{}=x"])
def test_launch_unsupported_option_names_the_alternative(capsys, option, advice, form):
    with pytest.raises(SystemExit, match="2"):
        launch(*form.format(option).split(), __file__)
    printed = capsys.readouterr().err
    assert printed.startswith(f"onecycle: `{option}` is not ")
    assert advice in printed


def test_launch_port_and_address_set_the_rendezvous(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("node0 slots=1\nnode1 slots=1\n")
    arguments = ("--master_addr", "10.1.1.1", "--master_port", 7000, __file__)
    for place in (("--hostfile", hosts), ()):
        status, output = launch("--dry-run", *place, *arguments)
        assert status == 0
        assert "--rdzv-endpoint 10.1.1.1:7000 " in output
        assert "--standalone" not in output


def test_launch_include_selects_devices_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    status, output = launch("--dry-run", "--json", "--include", "localhost:1,3", __file__)
    assert status == 0
    [node] = json.loads(output)["nodes"]
    assert node["env"]["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert node["ranks"] == [0, 1]


def test_launch_pass_local_rank_is_the_first_argument_of_the_script():
    options = ("--dry-run", "--json", "--nproc", 1, "--pass-local-rank")
    for more in ((), ("--bind-cores",)):
        status, output = launch(*options, *more, __file__, "--epochs")
        assert status == 0
        argv = json.loads(output)["nodes"][0]["argv"]
        assert argv[-3:] == [__file__, LOCAL_RANK_ARGUMENT, "--epochs"]
