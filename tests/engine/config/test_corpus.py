"""Test validation on real configs: clean ones have only notes, known mistakes are located."""

import json
import random
import re
from pathlib import Path

import jsonschema
import pytest

import schemas
from engine.config import load_document
from engine.config.parser import parse
from engine.config.schema import is_ignored
from engine.config.validate import check
from engine.config.violations import check_against_schema
from tests.testing.corpus import (
    CLEAN,
    INDEX,
    OTHER,
    count_refused_by_torch,
    path_of,
    problems_of,
)

ids = pytest.mark.parametrize


def test_check_clean_configs_have_only_notes():
    reported = {
        (entry["file"], problem.rule, problem.line)
        for entry in CLEAN
        for problem in problems_of(entry)
        if problem.severity != "note"
    }
    assert reported == set()


def pointer_of(finding):
    return "/" + finding["key"].replace(".[]", "").replace(".", "/") if finding["key"] else ""


def test_check_every_known_mistake_is_located():
    missed = []
    for entry in OTHER:
        serious = [problem for problem in problems_of(entry) if problem.severity != "note"]
        for finding in entry["findings"]:
            if finding["kind"] != "mistake":
                continue
            place, line = pointer_of(finding), finding["line"]
            at_line = [problem for problem in serious if line in (None, problem.line)]
            inside = [p for p in serious if place and f"{p.pointer}/".startswith(f"{place}/")]
            if not at_line and not inside:
                missed.append((entry["file"], finding["category"], finding["key"]))
    assert missed == []


def test_check_observations_are_at_most_notes():
    over = []
    for entry in INDEX:
        mistakes = {f["line"] for f in entry["findings"] if f["kind"] == "mistake"}
        for finding in entry["findings"]:
            line = finding["line"]
            if finding["kind"] == "observation" and line and line not in mistakes:
                serious = [p for p in problems_of(entry) if p.severity != "note"]
                over += [(entry["file"], p.rule) for p in serious if p.line == line]
    assert over == []


def test_clean_configs_that_torch_refuses_are_those_in_the_docs():
    refused, by_key = count_refused_by_torch()
    page = (Path(__file__).parents[3] / "docs" / "drop_in.md").read_text(encoding="utf-8")
    section = page.partition("## Real configs on the PyTorch backend")[2]
    rows = re.findall(r"^\| `([\w.]+)` \| (\d+) \|", section, re.MULTILINE)
    assert {key: int(count) for key, count in rows} == by_key
    assert f"refuses {refused} of {len(CLEAN)}" in section


@pytest.mark.slow
def test_editor_schema_agrees_with_check_on_single_values():
    """The schema cannot express the rules for combinations of values, so these are excluded."""
    editor = schemas.read(schemas.EDITOR)
    jsonschema.Draft7Validator.check_schema(editor)
    validator = jsonschema.Draft7Validator(editor)
    by_itself = {
        "unsupported-auto",
        "missing-key",
        "out-of-range",
        "removed-key",
        "unknown-key",
        "unknown-optimizer",
        "unknown-scheduler",
        "wrong-type",
    }
    compared = 0
    for entry in INDEX:
        document = load_document(path_of(entry))
        if document.value is None or any(p.rule == "unquoted" for p in document.problems):
            continue
        ours = [p for p in check(document, None) if p.rule in by_itself]
        assert validator.is_valid(document.value) == (not ours), (entry["file"], ours)
        compared += 1
    assert compared > 600


def misspell(key, randomness):
    """Return the key after one or two random edits."""
    letters = list(key)
    for _ in range(randomness.choice((1, 2))):
        at = randomness.randrange(len(letters))
        match randomness.choice(("drop", "double", "swap", "replace")):
            case "drop" if len(letters) > 2:
                del letters[at]
            case "swap" if at + 1 < len(letters):
                letters[at], letters[at + 1] = letters[at + 1], letters[at]
            case "replace":
                letters[at] = randomness.choice("abcdefghijklmnopqrstuvwxyz_")
            case _:
                letters.insert(at, letters[at])
    return "".join(letters)


def known_keys(document):
    """Return the pointers of the keys in a clean config that a schema defines."""
    free = ("/autotuning/arg_mappings", "/pipeline", "curriculum_metrics", "schedule_config")
    return [
        pointer
        for pointer in document.locations
        if pointer
        and not pointer.rpartition("/")[2].isdigit()
        and not any(is_ignored(part) for part in pointer.split("/")[1:])
        and not any(f"{name}/" in f"{pointer}/" for name in free)
        and pointer.rpartition("/")[2].isidentifier()
    ]


@pytest.mark.slow
def test_check_misspelled_keys_are_found_and_corrected():
    randomness = random.Random(20220)
    found = corrected = 0
    missed = []
    count = 1000
    while found < count:
        entry = randomness.choice(CLEAN)
        document = load_document(path_of(entry))
        pointer = randomness.choice(known_keys(document))
        key = pointer.rpartition("/")[2]
        typo = misspell(key, randomness)
        line, column = document.locations[pointer].key
        lines = document.text.splitlines(keepends=True)
        around = json.loads(json.dumps(document.get_value(pointer.rpartition("/")[0])))
        if typo in around or is_ignored(typo) or typo == key:
            continue
        start = column - 1
        lines[line - 1] = (
            lines[line - 1][:start] + f'"{typo}"' + lines[line - 1][start + len(key) + 2 :]
        )
        changed = parse("".join(lines), entry["file"])
        here = [p for p in check(changed, None) if p.rule == "unknown-key" and p.line == line]
        if is_valid_key(changed, pointer, typo):
            continue
        assert here, (entry["file"], pointer, typo)
        found += 1
        corrected += f"`{key}`" in here[0].hint
        if f"`{key}`" not in here[0].hint:
            missed.append((key, typo, here[0].hint))
    assert corrected >= 0.95 * count, missed


def is_valid_key(document, pointer, typo):
    """Return whether the edited key is a valid key of the same object."""
    below = f"{pointer.rpartition('/')[0]}/{typo}"
    problems = check_against_schema(document, document.value, schemas.read("ds_config.schema.json"))
    return below not in {p.pointer for p in problems} and not below.startswith(
        ("/optimizer/params/", "/scheduler/params/")
    )
