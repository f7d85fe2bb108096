"""Reading and saving the config file: byte for byte, with a backup, and no lost changes."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ui.config_file import ConfigFile, FileChangedError

TEXTS = st.sampled_from(["", "a", "{}", "é😀", "a b"])
LINES = st.lists(st.tuples(TEXTS, st.sampled_from(["\n", "\r\n", "\r"])), max_size=8)


@settings(deadline=None)  # it writes files
@given(lines=LINES, last=TEXTS, mark=st.booleans(), data=st.data())
def test_save_restores_line_ends_and_changes_only_the_edited_line(
    tmp_path_factory, lines, last, mark, data
):
    # "\n" after "\r" would be one line end.
    ends = [end for _, end in lines]
    texts = [text for text, _ in lines]
    pairs = zip(ends, [*texts[1:], last][: len(ends)], [*ends[1:], ""][: len(ends)], strict=True)
    if any(a == "\r" and not text and b.startswith("\n") for a, text, b in pairs):
        return
    path = tmp_path_factory.mktemp("file") / "c.json"
    prefix = "\ufeff" if mark else ""
    path.write_bytes((prefix + "".join(map("".join, lines)) + last).encode())
    original = path.read_bytes()
    file = ConfigFile(path)
    text, version = file.read()
    assert text.split("\n") == [*texts, last]
    assert file.save(text, version) == version
    assert path.read_bytes() == original
    assert not path.with_name("c.json.bak").exists()

    rows = text.split("\n")
    index = data.draw(st.integers(0, len(rows) - 1))
    rows[index] += "Z"
    file.save("\n".join(rows), version)
    texts = [*texts, last]
    texts[index] += "Z"
    expected = "".join(f"{text}{end}" for text, end in zip(texts, [*ends, ""], strict=True))
    assert path.read_bytes().decode() == prefix + expected
    assert path.with_name("c.json.bak").read_bytes() == original


def test_save_of_a_file_changed_by_another_program_is_refused(tmp_path):
    path = tmp_path / "c.json"
    path.write_text("{}")
    file = ConfigFile(path)
    _, version = file.read()
    path.write_text('{"a": 1}')
    with pytest.raises(FileChangedError, match="changed by another program"):
        file.save('{"b": 1}', version)
    assert path.read_text() == '{"a": 1}'
    file.save('{"b": 1}', file.find_version())
    assert path.read_text() == '{"b": 1}'


def test_new_file_is_created_on_save_without_a_backup(tmp_path):
    file = ConfigFile(tmp_path / "new.json", "template")
    text, version = file.read()
    assert (text, version) == ("template", "")
    file.save(text, version)
    assert [each.name for each in tmp_path.iterdir()] == ["new.json"]
    assert (tmp_path / "new.json").read_text() == "template"


def test_save_keeps_the_mode_and_a_link(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("{}")
    target.chmod(0o640)
    link.symlink_to(target)
    file = ConfigFile(link)
    file.save("{ }", file.read().version)
    assert link.is_symlink()
    assert target.read_text() == "{ }"
    assert target.stat().st_mode & 0o777 == 0o640


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.json"
    path.write_text("{}")
    file = ConfigFile(path)
    version = file.read().version

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        file.save('{"a": 1}', version)
    assert path.read_text() == "{}"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["c.json", "c.json.bak"]


@pytest.mark.parametrize("kind", ["directory", "pipe", "large", "not UTF-8"])
def test_read_of_an_unusable_file_is_an_error_and_does_not_block(tmp_path, kind):
    path = tmp_path / "c.json"
    match kind:
        case "directory":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "large":
            path.write_bytes(b" " * 1_000_001)
        case "not UTF-8":
            path.write_bytes(b"{\xff}")
    with pytest.raises((OSError, ValueError)):
        ConfigFile(path).read()
