"""Check that a Python interpreter can run onecycle before it creates a virtual environment.

    PYTHON tools/check_python.py COMMAND

COMMAND is the name of the interpreter in the error message. The script must also run with an older
Python 3, to report its version.
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
