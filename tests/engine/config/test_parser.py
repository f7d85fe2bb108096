"""Test the parser: values, positions, and rejected texts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.parser import parse


def rules(document):
    return [(p.rule, p.line, p.column) for p in document.problems]


@pytest.mark.parametrize(
    ("text", "pointer", "key", "value"),
    [
        ('{"a": 1}', "/a", (1, 2), (1, 7)),
        ('{\n\t"a":\t1\n}', "/a", (2, 2), (2, 7)),
        ('{\r\n  "a": 1\r\n}', "/a", (2, 3), (2, 8)),
        ('\ufeff{"a": 1}', "/a", (1, 2), (1, 7)),
        ('{"😀": 0, "a": 1}', "/a", (1, 10), (1, 15)),
        ('{"a": [1, {"b": 2}]}', "/a/1/b", (1, 12), (1, 17)),
        ('{"x/y~z": 1}', "/x~1y~0z", (1, 2), (1, 11)),
        ('{ // note\n "a": 1}', "/a", (2, 2), (2, 7)),
    ],
)
def test_parse_positions_of_keys_and_values_are_exact(text, pointer, key, value):
    place = parse(text, "f").locations[pointer]
    assert (place.key, place.value) == (key, value)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    ),
    st.sampled_from([None, 1, "\t"]),
    st.booleans(),
)
def test_parse_strict_json_agrees_with_the_json_module(value, indent, ascii_only):
    document = parse(json.dumps(value, indent=indent, ensure_ascii=ascii_only), "f")
    assert document.value == value
    assert not document.problems


@given(st.text(alphabet='{}[]",:0123456789.eE+-#/*\\ntrufalse \n\ufeff', max_size=60))
def test_parse_any_text_returns_problems_with_positions(text):
    document = parse(text, "f")
    for problem in document.problems:
        assert problem.line >= 1
        assert problem.column >= 1
        assert problem.message


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, // note\n}',
        '{"a": 1 # note\n}',
        '{/* a\nlong note */ "a": 1}',
        '{"a": 1,}',
    ],
)
def test_parse_comment_or_trailing_comma_is_accepted_with_a_note(text):
    document = parse(text, "f")
    assert document.value == {"a": 1}
    assert [p.severity for p in document.problems] == ["note"]


def test_parse_line_break_instead_of_comma_is_accepted_with_a_note():
    document = parse('{"a": [2\n3]\n"b": 1}', "f")
    assert document.value == {"a": [2, 3], "b": 1}
    (problem,) = document.problems
    assert (problem.rule, problem.line, problem.column) == ("not-strict-json", 1, 9)


@pytest.mark.parametrize(
    ("text", "expected", "message"),
    [
        ("", [("syntax", 1, 1)], "must be a JSON object"),
        ("  \n ", [("syntax", 2, 2)], "got an empty file"),
        ('{"a": 1', [("syntax", 1, 8)], 'Expected "," or "}", got the end of the file'),
        ('{"a" 1}', [("syntax", 1, 6)], 'Expected ":", got "1"'),
        ('{"a": }', [("syntax", 1, 7)], "Expected a value"),
        ('{"a": yes}', [("unquoted", 1, 7)], 'Write "yes".'),
        ('{"a": True, "b": None}', [("unquoted", 1, 7), ("unquoted", 1, 18)], "Write true."),
        ('{"a": /tmp/x y\n}', [("unquoted", 1, 7)], 'Write "/tmp/x y".'),
        ("{'a': 1}", [("unquoted", 1, 2)], 'Write "a".'),
        ("{a: 'b'}", [("unquoted", 1, 2), ("unquoted", 1, 5)], "must be in double quotes"),
        ('{"a": "\\ud800"}', [("invalid-character", 1, 7)], "unpaired surrogate"),
        ('{"a": 01}', [("syntax", 1, 7)], "Expected a value"),
        ('{"a": "b\nc"}', [("syntax", 1, 7)], "Invalid string"),
        ('{"a": 1} {}', [("syntax", 1, 10)], "Expected the end of the file"),
        ("[" * 5000, [("syntax", 1, 102)], "more than 100 levels"),
        ('{"a": NaN}', [("not-finite", 1, 7)], "`/a` must be a finite number"),
        ('{"a": -Infinity}', [("not-finite", 1, 7)], "got -Infinity"),
        ('{"a": 1e999}', [("not-finite", 1, 7)], "got 1e999"),
        ('{"a": ' + "9" * 10_000 + "}", [("not-finite", 1, 7)], "got 99999"),
        (
            '{"a": 1,\n "b": 2, "a": 3}',
            [("duplicate-key", 2, 10)],
            "Duplicate key `a`. The key is already set on line 1.",
        ),
    ],
)
def test_parse_invalid_text_returns_the_problem_and_its_position(text, expected, message):
    document = parse(text, "f")
    assert rules(document) == expected
    assert message in str(document.problems[0])
