"""Run the ``onecycle`` command, as in ``python -m onecycle validate ds_config.json``."""

from __future__ import annotations

from onecycle.isolated import run_isolated

__all__ = ["main"]


def main() -> int:
    """Run the ``onecycle`` command and return its exit status.

    This function is the entry point of the installed ``onecycle`` script. The script does not need
    `run_isolated`, because it does not put the working directory on ``sys.path``.
    """
    from engine.cli.main import main as run_command

    return run_command()


if __name__ == "__main__":
    run_isolated("engine.cli.main")
