"""The corpus of real configs, and what is known about each."""

import json
from pathlib import Path

from engine import ConfigError
from engine.config import load_document
from engine.config.validate import check

FOLDER = Path(__file__).parents[1] / "corpus"
INDEX = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))
CLEAN = [entry for entry in INDEX if entry["folder"] == "clean"]
OTHER = [entry for entry in INDEX if entry["folder"] == "other"]


def path_of(entry):
    return FOLDER / entry["folder"] / entry["file"]


def problems_of(entry):
    """What the checker says of an entry, for the number of ranks that it was written for."""
    world_size = (
        entry.get("implied_world_size") if entry.get("accepted_but_for_world_size") else None
    )
    try:
        return check(load_document(path_of(entry)), world_size)
    except ConfigError as error:
        return list(error.problems)
