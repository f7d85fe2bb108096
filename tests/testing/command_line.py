"""Run the ``onecycle`` command in the process of the test."""

import io

from engine.cli.main import main


def run(*arguments):
    """Return the exit status, the output and the error output of a command."""
    out, err = io.StringIO(), io.StringIO()
    status = main([str(argument) for argument in arguments], out, err)
    return status, out.getvalue(), err.getvalue()
