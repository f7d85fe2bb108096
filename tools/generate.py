"""Write the files that are generated from the code, or with --check say which are out of date."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from schedules import SCHEDULES
from schedules.json_schema import json_schema_of

ROOT = Path(__file__).resolve().parent.parent


def generated() -> dict[Path, str]:
    """Return every generated file's path and text."""
    folder = ROOT / "schemas" / "schedulers"
    return {
        folder / f"{name}.json": json.dumps(json_schema_of(cls), indent=2) + "\n"
        for name, cls in SCHEDULES.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    check = parser.parse_args().check
    files = generated()
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    folders = {path.parent for path in files}
    stray = [path for folder in folders for path in folder.glob("*.json") if path not in files]
    for path in stale + stray:
        print(f"{path.relative_to(ROOT)} differs from the code: run `make generate`.")
    if check:
        return 1 if stale or stray else 0
    for path in stale:
        path.write_text(files[path])
    for path in stray:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
