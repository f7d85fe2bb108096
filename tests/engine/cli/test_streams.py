"""The ``onecycle`` command: output in encodings that lack characters, and Ctrl-C."""

import io

import pytest

from engine.cli.main import main
from engine.cli.parser import import_command
from engine.distributed.environment import INTERRUPTED, INVALID, OK
from tests.testing.command_line import run


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_output_replaces_characters_that_the_encoding_lacks(tutorial, encoding):
    commands = (
        ["plot", tutorial, "-t"],
        ["plot", tutorial, "--csv", "-", "--steps", 2],
        ["schedules"],
        ["schedules", "OneCycle"],
        ["schema", "OneCycle"],
    )
    for command in commands:
        status, expected, _ = run(*command)
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        assert main([str(argument) for argument in command], out) == status == OK
        out.flush()
        assert out.buffer.getvalue() == expected.encode(encoding, errors="replace")
        assert out.errors == "strict"


def test_output_replaces_each_wide_character_by_two_columns(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"_注釈": "日本語のコメント", "gradient_cliping": 1}', encoding="utf-8")
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    assert main(["validate", str(path)], out) == INVALID
    out.flush()
    *_, source, caret, summary = out.buffer.getvalue().decode("latin-1").splitlines()
    assert source == '  {"_????": "????????????????", "gradient_cliping": 1}'
    assert caret.index("^") == source.index('"gradient_cliping"')
    assert summary == f"{path}: 2 errors"


def test_output_keeps_the_error_handler_that_the_user_chose():
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    assert main(["schedules", "OneCycle"], out) == OK
    out.flush()
    assert b"\\u" in out.buffer.getvalue()


@pytest.mark.parametrize("name", ["validate", "plot", "doctor", "memory", "checkpoint", "lr-test"])
def test_main_interrupted_prints_one_line_and_exits_with_130(name, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_command(name), "run", interrupt)
    arguments = {"memory": ["c.json", "--params", "9"], "checkpoint": ["ls", "c"], "doctor": []}
    status, out, err = run(name, *arguments.get(name, ["c.json"]))
    assert (status, out, err) == (INTERRUPTED, "", "onecycle: interrupted\n")
