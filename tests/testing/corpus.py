"""The corpus of real configs, with the known problems of each."""

import collections
import json
from pathlib import Path

from engine import ConfigError
from engine.config import load_document
from engine.config.pointers import dotted_name
from engine.config.validate import check

DIRECTORY = Path(__file__).parents[1] / "corpus"
INDEX = json.loads((DIRECTORY / "index.json").read_text(encoding="utf-8"))
CLEAN = [entry for entry in INDEX if entry["folder"] == "clean"]
OTHER = [entry for entry in INDEX if entry["folder"] == "other"]


def path_of(entry):
    return DIRECTORY / entry["folder"] / entry["file"]


def problems_of(entry, **engine):
    """Return the problems of an entry, checked for the world size that it was written for.

    Args:
        entry: entry of the index.
        engine: keys to add to the section ``engine`` of the config.
    """
    world_size = (
        entry.get("implied_world_size") if entry.get("accepted_but_for_world_size") else None
    )
    try:
        document = load_document(path_of(entry))
        if engine:
            document = load_document({**document.value, "engine": engine})
        return check(document, world_size)
    except ConfigError as error:
        return list(error.problems)


def count_refused_by_torch():
    """Return the number of clean configs that the torch backend refuses, and how many by key."""
    refused = [
        {dotted_name(each.pointer) for each in problems if each.severity == "error"}
        for problems in (problems_of(entry, backend="torch") for entry in CLEAN)
    ]
    return sum(map(bool, refused)), collections.Counter(key for keys in refused for key in keys)
