"""Check that the Python version is recent enough for onecycle.

    PYTHON tools/check_python.py COMMAND

The Makefile runs this script before it creates the virtual environment. The error message refers to
the interpreter as COMMAND. The script must also run on older versions of Python 3, so that it can
report them.
"""

import re
import sys
from pathlib import Path

_PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def main() -> int:
    required = re.search(r'requires-python = ">=(\d+)\.(\d+)"', _PYPROJECT.read_text())
    assert required is not None
    oldest = int(required.group(1)), int(required.group(2))
    if sys.version_info[:2] >= oldest:
        return 0
    needed = f"{oldest[0]}.{oldest[1]}"
    found = f"{sys.version_info[0]}.{sys.version_info[1]}"
    print(
        f"onecycle requires Python {needed} or newer, but `{sys.argv[1]}` is Python {found}. Set "
        f"PYTHON to a newer interpreter, for example: make demo PYTHON=python{needed}"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
