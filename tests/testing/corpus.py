"""The corpus of real configs, with the known problems of each."""

import json
from pathlib import Path

from engine import ConfigError
from engine.config import load_document
from engine.config.validate import check

DIRECTORY = Path(__file__).parents[1] / "corpus"
INDEX = json.loads((DIRECTORY / "index.json").read_text(encoding="utf-8"))
CLEAN = [entry for entry in INDEX if entry["folder"] == "clean"]
OTHER = [entry for entry in INDEX if entry["folder"] == "other"]


def path_of(entry):
    return DIRECTORY / entry["folder"] / entry["file"]


def problems_of(entry):
    """Validate a config of the corpus, if necessary for a given world size; return its problems."""
    world_size = (
        entry.get("implied_world_size") if entry.get("accepted_but_for_world_size") else None
    )
    try:
        return check(load_document(path_of(entry)), world_size)
    except ConfigError as error:
        return list(error.problems)
