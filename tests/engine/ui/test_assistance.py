"""Completion and hover help at a position of the text, which may be invalid JSON."""

import pytest

from engine.ui.assistance import complete, describe
from engine.ui.cursor import from_utf16, locate, to_utf16
from schedules import SCHEDULES
from schedules.core.fields import read_fields


def complete_at(marked):
    """Complete at the `|` in a text; return the options by label, and the text to be replaced."""
    offset = marked.index("|")
    text = marked.replace("|", "")
    found = complete(text, to_utf16(text, offset))
    replaced = text[from_utf16(text, found["from"]) : from_utf16(text, found["to"])]
    return {option["label"]: option for option in found["options"]}, replaced


def test_keys_of_a_schedule_follow_its_type_also_if_it_comes_later():
    options, replaced = complete_at('{"scheduler": {"params": {"cyc|"}, "type": "OneCycle"}}')
    assert replaced == '"cyc"'
    assert "cycle_max_lr" in options
    assert "warmup_num_steps" not in options


@pytest.mark.parametrize(
    ("marked", "present", "absent"),
    [
        ('{"train_batch_size": 8, |}', "gradient_clipping", "train_batch_size"),
        ('{"train_batch_size": 8\n  "gra|"}', "gradient_clipping", "train_batch_size"),
        ('{"fp16": {|', "enabled", "train_batch_size"),
        ('{"fp16": {"enabled": true}, |', "bf16", "enabled"),
        ('{/* { */ "fp16": {} // }\n, "|"', "bf16", "fp16"),
        ('{"optimizer": {"type": "SGD", "param_groups": [{"lr": 1}, {|}]}}', "momentum", "betas"),
        ('{"scheduler": {"type": |}}', "OneCycle", "AdamW"),
        ('{"optimizer": {"type": "|"}}', "AdamW", "OneCycle"),
        ('{"fp16": {"enabled": |}}', "true", "1"),
        ('{"zero_optimization": {"stage": |', "3", "4"),
        (
            '{"optimizer": {"type": "SGD", "param_groups": [{"scheduler": {"type": "|"}}]}}',
            "StepLR",
            "SGD",
        ),
    ],
)
def test_options_are_those_that_are_valid_at_the_cursor(marked, present, absent):
    options, _ = complete_at(marked)
    assert present in options
    assert absent not in options


@pytest.mark.parametrize(
    "marked", ['{"a" |', "{ // comm|", "|", '{"fp16": {}|', "[1, |", '{"x|": 1']
)
def test_no_key_of_the_schema_is_offered_elsewhere(marked):
    options, _ = complete_at(marked)
    assert "enabled" not in options


def test_inserted_key_has_its_default_and_a_comma_before_the_next_key():
    options, _ = complete_at('{|\n"train_batch_size": 8}')
    assert options["gradient_clipping"]["insert"] == '"gradient_clipping": 1.0,'
    assert options["fp16"]["insert"] == '"fp16": {},'
    options, _ = complete_at('{"gradient_cl|": 1.0}')
    assert options["gradient_clipping"]["insert"] == '"gradient_clipping"'


def test_removed_and_deprecated_keys_are_not_offered():
    options, _ = complete_at("{|}")
    assert "disable_allgather" not in options


def test_help_has_the_meaning_the_range_the_default_and_other_names():
    text = '{"😀": 1, "gradient_clipping": 1.0}'
    found = describe(text, to_utf16(text, text.index("clip")))
    assert text[from_utf16(text, found["from"]) : from_utf16(text, found["to"])] == (
        '"gradient_clipping"'
    )
    lines = "\n".join(found["lines"])
    assert "Maximum L2 norm" in lines
    assert "at least 0; default 1.0" in lines
    assert "clip_grad_norm" in lines


def test_help_of_a_type_is_the_documentation_of_the_schedule():
    text = '{"scheduler": {"type": "OneCycle"}}'
    found = describe(text, text.index("OneCycle"))
    assert found["lines"][0].startswith("1Cycle: the learning rate rises and falls")


def test_unknown_key_has_no_help():
    assert describe('{"nonsense": 1}', 4)["lines"] == []


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_param_of_a_schedule_has_help(name):
    for param in read_fields(SCHEDULES[name]):
        text = f'{{"scheduler": {{"type": "{name}", "params": {{"{param}": 1}}}}}}'
        assert describe(text, text.index(f'"{param}"') + 1)["lines"]


def test_every_position_of_a_broken_text_can_be_located():
    text = '{"a": [1, {"b": "x\\"y", // c\n "d": }], "e" 3, /* f */ nul, "g'
    for offset in range(len(text) + 1):
        cursor = locate(text, offset)
        assert cursor.start <= offset <= max(cursor.end, offset)
        assert cursor.role in {"", "key", "value"}
        complete(text[:offset], offset)
        describe(text[:offset], offset)
