"""Execute docs/tutorial.ipynb in an empty directory, and store the outputs in the notebook."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.ipynb"
TIMEOUT = 300  # seconds for the start of the kernel, and for each cell


def execute(path: Path) -> nbformat.NotebookNode:
    """Execute a notebook, and return a copy with the outputs of its cells.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raises an exception.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as directory:
        scripts = Path(sys.executable).parent  # has the command `onecycle`
        os.environ.update(
            PATH=f"{scripts}{os.pathsep}{os.environ['PATH']}",
            IPYTHONDIR=f"{directory}/.ipython",
            JUPYTER_RUNTIME_DIR=f"{directory}/.jupyter",
            NO_COLOR="1",
        )
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT,
            record_timing=False,
            coalesce_streams=True,
            startup_timeout=TIMEOUT,
            resources={"metadata": {"path": directory}},
        )
        client.execute()
    # These values depend on the machine.
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=TUTORIAL, help="output file (default: docs/tutorial.ipynb)"
    )
    args = parser.parse_args()
    nbformat.write(execute(TUTORIAL), args.output)


if __name__ == "__main__":
    main()
