"""Setting and removing one value in the text of a config."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.parser import parse
from engine.config.text_edits import remove_key, set_value

COMMENTED = """\
{
  // batch
  "train_batch_size": 64,  # all ranks
  "scheduler": {
    "type": "OneCycle", /* shape */
    "params": {
      "cycle_min_lr": 0.1,
      "cycle_max_lr": 1.0  // peak, with a "quote" and a }
    }
  }
}
"""


def read(text):
    document = parse(text, "c.json")
    assert not [problem for problem in document.problems if problem.severity == "error"]
    return document.value


def test_set_value_existing_key_changes_only_the_value():
    new = set_value(parse(COMMENTED, "c.json"), "/scheduler/params/cycle_min_lr", 0.25)
    assert new == COMMENTED.replace("0.1,", "0.25,")


def test_set_value_new_key_follows_the_comment_of_the_last_key():
    new = set_value(parse(COMMENTED, "c.json"), "/scheduler/params/relative", True)
    assert new == COMMENTED.replace(
        '"cycle_max_lr": 1.0  // peak, with a "quote" and a }\n',
        '"cycle_max_lr": 1.0,  // peak, with a "quote" and a }\n      "relative": true\n',
    )


def test_set_value_missing_parent_is_added_with_the_indentation_of_its_siblings():
    text = '{\n    "scheduler": {\n        "type": "WarmupLR"\n    }\n}\n'
    new = set_value(parse(text, "c.json"), "/scheduler/params/warmup_num_steps", 5)
    assert new == (
        '{\n    "scheduler": {\n        "type": "WarmupLR",\n        "params": {\n'
        '          "warmup_num_steps": 5\n        }\n    }\n}\n'
    )


def test_set_value_below_a_number_is_an_error():
    with pytest.raises(ValueError, match="is not an object"):
        set_value(parse('{"a": 1}', "c.json"), "/a/b", 2)


@pytest.mark.parametrize(
    ("text", "pointer", "expected"),
    [
        ('{\n  "a": 1,\n  "b": 2\n}', "/a", '{\n  "b": 2\n}'),
        ('{\n  "a": 1,\n  "b": 2\n}', "/b", '{\n  "a": 1\n}'),
        ('{"a": 1, "b": 2, "c": 3}', "/b", '{"a": 1, "c": 3}'),
        ('{"a": 1}', "/a", "{}"),
        ('{\n  "a": 1, // one\n  "b": [2, {}] // two\n}', "/b", '{\n  "a": 1 // one\n   // two\n}'),
    ],
    ids=["first line", "last line", "same line", "only key", "comments"],
)
def test_remove_key_removes_its_comma_and_keeps_comments(text, pointer, expected):
    assert remove_key(parse(text, "c.json"), pointer) == expected


KEYS = st.sampled_from(["a", "b", "c d", 'e"', "f/g", "~"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["", "{", "}, //", "#"]),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS, below, max_size=3),
    max_leaves=8,
)
GAPS = st.sampled_from(["", " ", "\n", "\n  ", " // } note\n", " # [\n  ", " /* , */ "])


@st.composite
def texts(draw, value):
    """Write a value as JSON with random whitespace, comments and trailing commas."""
    import json

    gap = lambda: draw(GAPS)  # noqa: E731
    if isinstance(value, dict | list):
        items = [
            f"{json.dumps(key)}{gap()}:{gap()}{draw(texts(each))}{gap()}"
            for key, each in (value.items() if isinstance(value, dict) else ())
        ] or [f"{draw(texts(each))}{gap()}" for each in value]
        body = ",".join(gap() + item for item in items)
        if items and draw(st.booleans()):
            body += "," + gap()
        left, right = "{}" if isinstance(value, dict) else "[]"
        return f"{left}{gap()}{body}{right}"
    return json.dumps(value)


@given(data=st.data(), value=st.dictionaries(KEYS, VALUES, max_size=4), key=KEYS, new=VALUES)
def test_edits_of_random_texts_change_one_key(data, value, key, new):
    text = data.draw(texts(value))
    assert read(text) == value
    pointer = "/" + key.replace("~", "~0").replace("/", "~1")
    changed = copy.deepcopy(value)
    changed[key] = new
    assert read(set_value(parse(text, "c.json"), pointer, new)) == changed
    if key in value:
        del changed[key]
        assert read(remove_key(parse(text, "c.json"), pointer)) == changed
