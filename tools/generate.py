"""Write the JSON schemas, type stubs and reference pages that are generated from the code.

With --check, list the outdated files instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from config_reference import build_config_pages
from schedule_reference import build_schedule_pages, draw_schedules

import engine
import schedules
import schemas
from engine.config.editor_schema import editor_schema
from schedules.core.descriptions import INDEX, read_index, read_source_descriptions
from schedules.core.json_schema import build_json_schema
from schedules.core.registry import FAMILIES, import_family

ROOT = Path(__file__).resolve().parent.parent
SHARED = {ROOT / "docs", ROOT / "engine", ROOT / "schedules"}
"""Directories that contain both generated and handwritten files."""


def build_schedule_schemas() -> dict[Path, str]:
    """Return a dict that maps the path of each schedule's JSON Schema to its text."""
    directory = ROOT / "schemas" / "schedulers"
    return {
        directory / f"{name}.json": json.dumps(build_json_schema(cls), indent=2) + "\n"
        for family in FAMILIES
        for name, cls in import_family(family).items()
    }


def generate_files() -> dict[Path, str]:
    """Return a dict that maps the path of each generated file to its text."""
    files = build_schedule_schemas()
    files[ROOT / "schemas" / schemas.EDITOR] = json.dumps(editor_schema(), indent=1) + "\n"
    files[INDEX] = build_index()
    for package in (engine, schedules):
        files[ROOT / package.__name__ / "__init__.pyi"] = "\n".join(build_stub(package)) + "\n"
    pages = build_config_pages() | build_schedule_pages()
    files |= {ROOT / "docs" / name: text for name, text in pages.items()}
    return files


def build_index() -> str:
    """Return the text of the JSON file `INDEX`.

    For each schedule, the file contains the family and the descriptions of the fields.
    """
    entries = {
        name: {"family": family, "fields": read_source_descriptions(cls)}
        for family in FAMILIES
        for name, cls in import_family(family).items()
    }
    return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"


def build_stub(package: ModuleType) -> Iterator[str]:
    """Yield the lines of a type stub for a package that imports its public names lazily."""
    yield "# Generated from the package's `__all__` by `make generate`."
    yield ""
    imports = []
    for name in package.__all__:
        if name == "__version__":
            continue
        value = getattr(package, name)
        own_name = getattr(
            value, "__name__", name
        )  # the type of a schedule may differ from its class name
        renamed = "" if own_name == name else f" as {name}"
        imports.append(f"from {value.__module__} import {own_name}{renamed}")
    yield from sorted(imports)
    yield ""
    yield "__version__: str"
    yield ""
    yield "__all__ = ["
    yield from (f'    "{name}",' for name in package.__all__)
    yield "]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--pictures", action="store_true", help="also draw the plots of the schedules"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing, and exit with status 1 if a file is outdated",
    )
    args = parser.parse_args()
    if args.pictures:
        draw_schedules(ROOT / "docs" / "pictures")
    check = args.check
    if not check:
        # The schemas are built from the index, and the other files are built from the schemas.
        INDEX.write_text(build_index(), encoding="utf-8")
        read_index.cache_clear()
        for path, text in build_schedule_schemas().items():
            path.write_text(text)
        schemas.read.cache_clear()
    files = generate_files()
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    patterns = {(path.parent, path.suffix) for path in files if path.parent not in SHARED}
    stray = [
        path
        for directory, suffix in patterns
        for path in directory.glob(f"*{suffix}")
        if path not in files
    ]
    for path in stale + stray:
        print(f"{path.relative_to(ROOT)} is outdated. Run `make generate`.")
    if check:
        return 1 if stale or stray else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[path])
    for path in stray:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
