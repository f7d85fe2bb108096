"""Define a launch request, and derive its fields from command-line options and files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import LaunchError
from engine.launch.hosts import Host

__all__ = [
    "LaunchRequest",
    "bind_to_cores",
    "build_module_command",
    "find_config",
    "read_variables",
]

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONFIG_KEYS = {"train_batch_size", "train_micro_batch_size_per_gpu", "optimizer", "scheduler"}


@dataclass(frozen=True)
class LaunchRequest:
    """The script to launch, the hosts to launch it on, and the launch options."""

    script: tuple[str, ...]
    """The script and its arguments, or any command if ``is_command`` is true."""
    hosts: tuple[Host, ...]
    is_local: bool = True
    """Whether the job runs only on this machine. If false, the hosts are reached over ssh."""
    is_command: bool = False
    is_module: bool = False
    min_nodes: int | None = None
    """Minimum number of hosts that the job needs; None if it needs all of them."""
    max_restarts: int = 0
    timeout: int = 600
    rendezvous_timeout: int = 300
    store: tuple[str, int] | None = None
    """Host name and port of the rendezvous if the launcher runs it; None if the first host does.

    If the launcher runs the rendezvous, the job can survive the loss of any host, even the first.
    """
    address: str | None = None
    """Address at which all hosts reach the first host; None for the address that ssh uses."""
    port: int = 0
    """Port of the rendezvous if the first host runs it; 0 for a free port."""
    interface: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    pass_env: tuple[str, ...] = ()
    cwd: str = "."
    python: str = "python"
    log_dir: str | None = None
    grace: int = 30
    ssh_options: tuple[str, ...] = ()
    job: str = "onecycle"


def bind_to_cores(
    script: tuple[str, ...], python: str, *, is_module: bool, is_command: bool
) -> tuple[str, ...]:
    """Return a command that binds a rank to its own CPU cores and then runs the script.

    Args:
        script: script or command to run, with its arguments.
        python: Python interpreter.
        is_module: whether ``script`` starts with the name of a module, as for ``python -m``.
        is_command: whether ``script`` is a command that is run without Python.
    """
    interpreter = () if is_command else (python, "-u", *(("-m",) if is_module else ()))
    return (*build_module_command(python, "engine.launch.affinity"), *interpreter, *script)


def build_module_command(python: str, module: str) -> tuple[str, ...]:
    """Return a command that runs a module of onecycle.

    The command ignores a module of the same name in the working directory.

    Args:
        python: Python interpreter.
        module: fully qualified name of the module.
    """
    return (python, "-m", "onecycle.isolated", module)


def find_config(script: tuple[str, ...], cwd: str) -> str | None:
    """Return the path of the config in the arguments of a script, or None if no config is found.

    The config is the first JSON file with a typical config key, such as ``optimizer``.

    Args:
        script: script and its arguments. An argument can be a path or `--option=path`.
        cwd: working directory of the script.
    """
    for argument in script[1:]:
        path = Path(cwd, argument.rpartition("=")[2])
        if path.suffix == ".json" and path.is_file():
            from engine.config import load_document

            value = load_document(path).value
            if isinstance(value, dict) and _CONFIG_KEYS & value.keys():
                return str(path if cwd == "." else path.resolve())
    return None


def read_variables(file: Path | None, assignments: Sequence[str]) -> dict[str, str]:
    """Read the environment variables to set on all ranks.

    The function reads `.deepspeed_env` in the working directory if that file exists, then ``file``,
    and then ``assignments``. If a variable is repeated, the last value is used.

    Args:
        file: file with lines ``NAME=VALUE`` and ``#`` comments.
        assignments: strings of the form ``NAME=VALUE``.

    Raises:
        LaunchError: if a line or an assignment does not have the form ``NAME=VALUE``, a name starts
            with a digit or contains characters other than letters, digits and underscores, or a
            value contains a null character.
        OSError: if a file cannot be read.
    """
    default = Path(".deepspeed_env")
    lines = []
    for path in ([default] if default.is_file() else []) + ([file] if file else []):
        lines += [
            line
            for line in path.read_text(encoding="utf-8-sig").split("\n")
            if line.strip() and not line.lstrip().startswith("#")
        ]
    variables = {}
    for line in (*lines, *assignments):
        name, equals, value = line.partition("=")
        # Other names cannot be set in a shell, and would be code in a job script.
        if "\0" in value:
            raise LaunchError(
                f"The value of `{name.strip()}` must not contain a null character. Correct the "
                "`--env` option or the file that contains the variable."
            )
        if not equals or not _VARIABLE.fullmatch(name.strip()):
            raise LaunchError(
                f"An environment variable must have the form NAME=VALUE, got {name!r}. Use only "
                "letters, digits and underscores in NAME. Correct the `--env` option or the file "
                "that contains the variable."
            )
        variables[name.strip()] = value
    return variables
