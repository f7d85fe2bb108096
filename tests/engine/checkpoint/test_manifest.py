"""Damaged and hostile manifests raise one error, and never stop a run from saving."""

import io
import json

import pytest

from engine.checkpoint import storage
from engine.checkpoint.manifest import MANIFEST, read_manifest
from engine.cli.main import main
from engine.errors import CheckpointError
from tests.engine.checkpoint.test_pruning import start, train

WRONG = [None, True, -1, 1.5, "x", [], {}, {"a": 1}, {"a": {"size": "1", "sha256": 2}}]
FILES = [
    {"../../etc/passwd": {"size": 1, "sha256": ""}},
    {"/etc/passwd": {"size": 1, "sha256": ""}},
]


@pytest.fixture
def saved(tmp_path):
    train(start(tmp_path, keep=None), 4).destroy()
    return tmp_path


def edit(checkpoint_dir, change):
    path = checkpoint_dir / MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("text", ["", "[]", "null", "1", '"x"', "[" * 100_000, '{"format": 1}'])
def test_manifest_that_is_no_object_is_an_error(saved, text):
    (saved / "global_step4" / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=MANIFEST):
        read_manifest(saved / "global_step4")


def test_every_key_of_a_manifest_with_any_other_value_is_an_error_or_a_manifest(saved):
    keys = json.loads((saved / "global_step4" / MANIFEST).read_text())
    for key in keys:
        for value in [*WRONG, *FILES]:
            edit(
                saved / "global_step4",
                lambda content, key=key, value=value: (
                    content.update({key: value}),
                    content.pop("checksum", None),
                ),
            )
            try:
                manifest = read_manifest(saved / "global_step4")
            except CheckpointError:
                pass
            else:
                assert list(storage.find_damage(saved / "global_step4", manifest)) is not None
            assert storage.list_checkpoints(saved)[0][0].name == "global_step2"
            edit(saved / "global_step4", lambda content: content.update(keys))


def test_changed_manifest_does_not_match_its_checksum(saved):
    edit(saved / "global_step4", lambda content: content.update(step=400))
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        read_manifest(saved / "global_step4")


def test_file_outside_the_checkpoint_is_an_error(saved):
    for files in FILES:
        edit(saved / "global_step4", lambda content, files=files: content.update(files=files))
        with pytest.raises(CheckpointError, match="`files` is invalid"):
            read_manifest(saved / "global_step4")


def test_run_saves_beside_a_damaged_manifest_and_resumes_from_the_other(saved):
    edit(saved / "global_step4", lambda content: content.update(sequence="x"))
    resumed = start(saved, keep=None)
    assert resumed.global_steps == 2
    train(resumed, 4)
    assert "global_step6" in [path.name for path, _ in storage.list_checkpoints(saved)]


def test_escape_sequence_in_a_manifest_is_printed_escaped(saved):
    def forge(content):
        content.update(created="\x1b[2J")
        del content["checksum"]

    edit(saved / "global_step4", forge)
    out = io.StringIO()
    assert main(["checkpoint", "ls", str(saved)], out) == 0
    assert "\\x1b[2J" in out.getvalue()
    assert "\x1b" not in out.getvalue()
