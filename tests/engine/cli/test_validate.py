"""`onecycle validate`, `explain` and `config`: formats, fixes, exit statuses, hostile input."""

import cProfile
import io
import json
import pstats
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cli.main import main
from engine.config.parser import parse
from engine.config.validate import check
from engine.display.terminal import count_columns
from tests.testing.corpus import CLEAN, path_of

TEN_MISTAKES = """{
  "train_batch_size": 7,
  "train_micro_batch_size_per_gpu": 2,
  "gradient_cliping": 1.0,
  "steps_per_print": "auto",
  "fp16": {"enabled": True},
  "zero_optimization": {
    "stage": 2,
    "offload_param": {"device": "cpu"},
    "reduce_bucket_size": -1
  },
  "optimizer": {"type": "AdamW", "params": {"lr": "0.001", "max_grad_norm": 1.0}},
  "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_steps": 100, "total_num_steps": 10}},
  "amp": {"enabled": false}
}
"""


def run(*arguments):
    out = io.StringIO()
    status = main([str(argument) for argument in arguments], out, out)
    return status, out.getvalue()


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "ds_config.json"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_validate_ten_mistakes_print_three_lines_each(file):
    path = file(TEN_MISTAKES)
    status, out = run("validate", "--quiet", path)
    lines = out.splitlines()
    heads = [line for line in lines if line.startswith(str(path))]
    assert status == 1
    assert [head.partition("error[")[2].partition("]")[0] for head in heads] == [
        "batch-sizes",
        "unknown-key",
        "unsupported-auto",
        "unquoted",
        "offload-without-stage",
        "out-of-range",
        "wrong-type",
        "removed-key",
        "unknown-key",
        "removed-key",
    ]
    assert len(lines) == 3 * len(heads)


def test_validate_formats_contain_the_same_problems(file):
    path = file(TEN_MISTAKES)
    found = json.loads(run("validate", "-q", "--format", "json", path)[1])
    assert {"file", "rule", "severity", "pointer", "line", "column", "message", "hint"} <= found[
        0
    ].keys()
    commands = run("validate", "-q", "--format", "github", path)[1].splitlines()
    assert commands[1].startswith(f"::error file={path},line=4,col=3,title=unknown-key::")
    (sarif,) = json.loads(run("validate", "-q", "--format", "sarif", path)[1])["runs"]
    assert len(found) == len(commands) == len(sarif["results"]) == 10
    result = sarif["results"][1]
    region = result["locations"][0]["physicalLocation"]["region"]
    assert (region["startLine"], region["startColumn"]) == (4, 3)
    assert sarif["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]


DEPRECATED = """{ // comment
  "train_batch_size": "8",
  "bfloat16": {"enabled": "True"},\t"lr_scheduler": {"type": "fixed_lr"}
}
"""


def test_validate_fix_changes_only_deprecated_keys_and_types(file):
    path = file("\ufeff" + DEPRECATED)
    status, out = run("validate", "--fix", path)
    assert status == 0
    assert out.endswith(": valid\n")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    fixed = DEPRECATED.replace('"8"', "8").replace("bfloat16", "bf16").replace('"True"', "true")
    assert path.read_text(encoding="utf-8-sig") == fixed.replace("lr_scheduler", "scheduler")


def test_validate_diff_prints_fixes_without_writing(file):
    path = file(DEPRECATED)
    status, out = run("validate", "--diff", path)
    assert status == 1
    assert '\n-  "train_batch_size": "8",\n' in out
    assert '\n+  "train_batch_size": 8,\n' in out
    assert path.read_text() == DEPRECATED


def test_validate_fix_of_standard_input_is_an_error_and_diff_prints_the_fixes(monkeypatch):
    status, out = run("validate", "--fix", "-")
    assert (status, "`--fix` cannot write to standard input" in out) == (2, True)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(DEPRECATED.encode())))
    status, out = run("validate", "--diff", "-")
    assert (status, '\n+  "train_batch_size": 8,\n' in out) == (1, True)


def test_validate_fix_does_not_overwrite_an_existing_key(file):
    text = '{"train_batch_size": 8, "bf16": {"enabled": true}, "bfloat16": {"enabled": false}}'
    path = file(text)
    assert run("validate", "--fix", path)[0] == 1
    assert path.read_text() == text


def test_validate_fix_also_fixes_what_a_first_fix_reveals(file):
    path = file('{"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"wd": "0.1"}}}')
    assert run("validate", "--fix", path)[0] == 0
    assert '"params": {"weight_decay": 0.1}' in path.read_text()


MISSPELLED = """{
  "train_batch_size": 8,
  "Gradient_Clipping": 1.0, // "a,]" is no trailing comma
  "optimizer": {"type": "AdamW", "params": {"lrr": 0.1, "betas": [0.9, 0.99, ]}},
  "scheduler": {"type": "onecycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2,}},
}
"""
SPELLED = """{
  "train_batch_size": 8,
  "gradient_clipping": 1.0, // "a,]" is no trailing comma
  "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "betas": [0.9, 0.99 ]}},
  "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2}}
}
"""


def test_validate_suggests_names_for_a_wrong_case(file):
    _, out = run("validate", file(MISSPELLED))
    assert "Did you mean `gradient_clipping`?" in out
    assert "Did you mean `OneCycle`?" in out


def test_validate_fix_without_terminal_applies_suggested_names_only_with_yes(file):
    path = file(MISSPELLED)
    status, out = run("validate", "--fix", path)
    assert status == 1
    assert out.startswith(
        f"{path}: 3 suggested names not applied. Use `--yes` to accept every suggestion.\n"
    )
    only_commas = MISSPELLED.replace(", ]", " ]").replace(",}", "}").replace("}},\n}", "}}\n}")
    assert path.read_text() == only_commas
    assert '\n+  "gradient_clipping": 1.0' in run("validate", "--diff", "--yes", path)[1]
    assert path.read_text() == only_commas
    status, out = run("validate", "--fix", "--yes", path)
    assert status == 0
    assert f"{path}:3:3: Replaced `Gradient_Clipping` with `gradient_clipping`.\n" in out
    assert out.count("Replaced") == 3
    assert path.read_text() == SPELLED
    assert run("validate", "--yes", path)[0] == 2


def test_validate_fix_does_not_replace_an_accepted_schedule_by_another_one(file):
    params = '{"min_lr": 0.1, "max_lr": 0.2}'  # parameters of AutoWU, not of OneCycle
    path = file(f'{{"train_batch_size": 8, "scheduler": {{"type": "1Cycle", "params": {params}}}}}')
    status, out = run("validate", "--fix", "--yes", path)
    assert status == 1
    assert "Replaced `1Cycle` with `OneCycle`." in out
    assert "OneCycle has no parameters `min_lr`, `max_lr`" in out
    assert '"OneCycle"' in path.read_text()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_validate_fix_in_a_terminal_asks_for_each_suggested_name(file, monkeypatch):
    path, out = file(MISSPELLED), Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal("y\nn\n\n"))
    assert main(["validate", "--fix", str(path)], out, out) == 1
    assert f"{path}:3:3: Replace `Gradient_Clipping` with `gradient_clipping`? [y/N]" in (
        out.getvalue()
    )
    assert "Replace `onecycle` with `OneCycle`?" in out.getvalue()
    text = path.read_text()
    assert '"gradient_clipping"' in text
    assert '"lrr"' in text
    assert '"onecycle"' in text


def test_validate_and_config_set_override_values_of_the_file(file):
    path = file(MISSPELLED.replace("Gradient_Clipping", "gradient_clipping").replace("lrr", "lr"))
    text = path.read_text()
    name = ("--set", "scheduler.type=OneCycle")
    assert run("validate", path)[0] == 1
    assert run("validate", path, *name)[0] == 0
    assert path.read_text() == text
    status, out = run("validate", path, *name, "--set", "optimizer.params.lr=-1")
    assert status == 1
    assert "got -1. The value was set by --set." in out
    status, out = run("config", path, *name, "--set", "fp16.enabled=true", "--diff", path, *name)
    assert status == 1  # the other config is read as it is
    lines = run("config", path, *name, "--set", "engine.max_duration=10ep")[1].splitlines()
    assert ["engine.max_duration", '"10ep"', "--set"] in [line.split() for line in lines]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train_batch_size", "must have the form KEY=VALUE, got 'train_batch_size'"),
        ("train_batch_size.x=1", "a parent of `train_batch_size.x` is not an object"),
    ],
)
def test_validate_set_that_cannot_be_applied_is_wrong_usage(file, assignment, message):
    status, out = run("validate", file('{"train_batch_size": 8}'), "--set", assignment)
    assert status == 2
    assert message in out


def test_validate_strict_treats_warnings_as_errors(file):
    flat = {"warmup_min_lr": 0.1, "warmup_max_lr": 0.1, "warmup_type": "linear"}
    scheduler = {"type": "WarmupLR", "params": flat}
    path = file(json.dumps({"train_batch_size": 8, "scheduler": scheduler}))
    status, out = run("validate", path)
    assert (status, out.splitlines()[-1]) == (0, f"{path}: valid, 1 warning")
    assert run("validate", "--strict", path)[0] == 1


def test_validate_accepts_standard_input_and_several_files(file, monkeypatch):
    text = '{"train_batch_size": "auto"}'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert run("validate", "-") == (0, "-: valid\n")
    assert run("validate", "--no-auto", file(text))[0] == 1
    assert run("validate", file(text), "nowhere.json")[0] == 2


def test_explain_prints_the_rule_and_suggests_names():
    status, out = run("explain", "unknown-key")
    assert status == 0
    assert out.startswith("unknown-key: ")
    assert "unquoted " in run("explain")[1]
    assert run("explain", "Unknown-Key") == run("explain", "unknown-key")
    assert run("explain", "unknwon-key") == (
        2,
        "onecycle: Unknown rule `unknwon-key`. Did you mean `unknown-key`?\n",
    )


def test_config_prints_every_value_and_its_origin(file):
    path = file('{\n "train_batch_size": 8,\n "zero_optimization": {"stage": 2}\n}')
    status, out = run("config", path, "--world-size", 2)
    lines = {line.split()[0]: line.split(None, 2)[1:] for line in out.splitlines()}
    assert status == 0
    assert lines["train_batch_size"] == ["8", f"{path}:2"]
    assert lines["train_micro_batch_size_per_gpu"][0] == "4"
    assert "2 ranks" in lines["train_micro_batch_size_per_gpu"][1]
    assert lines["zero_optimization.stage"] == ["2", f"{path}:3"]
    assert lines["zero_optimization.contiguous_gradients"] == ["true", "default"]
    assert lines["engine.backend"][0] == '"deepspeed"'
    printed = json.loads(run("config", path, "--json")[1])
    assert printed["zero_optimization"]["stage"] == 2
    assert run("validate", file(json.dumps(printed)))[0] == 0


HOSTILE = {
    "empty": b"",
    "binary": bytes(range(256)) * 100,
    "huge": b"[" + b"1," * 50_000_000,
    "deep": b"[" * 10_000,
    "deep objects": b'{"a":' * 10_000,
    "huge integer": b'{"train_batch_size": ' + b"9" * 100_000 + b"}",
    "nan": b'{"train_batch_size": NaN}',
    "surrogate": b'{"\\ud800": "\\udfff"}',
    "megabyte of key": b'{"' + b"k" * 900_000 + b'": 1}',
    "many keys": b"{" + b",".join(b'"k%d": 1' % n for n in range(15_000)) + b"}",
    "many numbers": b'{"x-a": [' + b"1," * 400_000 + b"1]}",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("form", ["text", pytest.param("sarif", marks=pytest.mark.slow)])
def test_validate_hostile_input_reports_a_clear_problem(tmp_path, content, form):
    path = tmp_path / "c.json"
    path.write_bytes(content)
    status, out = run("validate", "--format", form, path)
    assert status in {1, 2}
    assert "Traceback" not in out
    out.encode()
    assert max(map(len, out.splitlines() or [""])) < 1000


@pytest.mark.parametrize(
    "content_of",
    [
        lambda count: b"{" + b",".join(b'"k%d": 1' % n for n in range(count)) + b"}",
        lambda count: b'{"x-a": [' + b"1," * count + b"1]}",
    ],
    ids=["unknown keys", "numbers"],
)
def test_validate_cost_grows_linearly_with_the_config(tmp_path, content_of):
    def calls(count):
        path = tmp_path / "c.json"
        path.write_bytes(content_of(count))
        profile = cProfile.Profile()
        profile.runcall(run, "validate", path)
        return pstats.Stats(profile).total_calls

    calls(1)
    assert calls(800) <= 2.1 * calls(400)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8), below, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=settings.default.max_examples * 3 // 2)
@given(st.data())
def test_check_mutated_config_reports_problems_without_crashing(data):
    entry = data.draw(st.sampled_from(CLEAN))
    text = path_of(entry).read_text(encoding="utf-8-sig")
    value = parse(text, "f").value
    members = []

    def collect(around):
        for key, below in around.items() if isinstance(around, dict) else enumerate(around):
            members.append((around, key))
            if isinstance(below, dict | list):
                collect(below)

    collect(value)
    around, key = data.draw(st.sampled_from(range(len(members))).map(members.__getitem__))
    match data.draw(st.sampled_from(["drop", "rename", "retype", "move"])):
        case "drop":
            del around[key]
        case "rename" if isinstance(around, dict):
            around[data.draw(st.text(max_size=12))] = around.pop(key)
        case "move" if isinstance(value, dict):
            value[str(key)] = around[key]
        case _:
            around[key] = data.draw(JSON)
    for problem in check(parse(json.dumps(value), "f"), data.draw(st.sampled_from([None, 1, 8]))):
        assert problem.line >= 1
        assert problem.message


def test_config_diff_compares_resolved_values(tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text('{"train_batch_size": 8, "gradient_clipping": 1.0, "steps_per_print": 5}')
    second.write_text('{"train_batch_size": 16}')
    status, out = run("config", first, "--diff", second)
    assert status == 0
    assert [line.split() for line in out.splitlines()] == [
        ["train_batch_size", "8", "16"],
        ["train_micro_batch_size_per_gpu", "8", "16"],
        ["steps_per_print", "5", "-"],
    ]
    assert run("config", first, "--diff", first)[1] == ""


def test_validate_checks_durations_in_epochs_for_the_number_of_steps(file):
    params = {"total_num_steps": 300, "warmup_num_steps": 10}
    schedule = {"type": "WarmupDecayLR", "params": params}
    config = {"train_batch_size": 4, "scheduler": schedule, "engine": {"max_duration": "10ep"}}
    path = file(json.dumps(config))
    for arguments in ((), ("--steps-per-epoch", 30)):
        status, out = run("validate", *arguments, path)
        assert (status, "end-of-schedule" in out) == (0, False)
    assert "ends at step 300 of 1,000" in run("validate", "--steps-per-epoch", 100, path)[1]


def test_validate_run_of_less_than_an_epoch_may_be_long_enough(file):
    run_length = {"max_duration": "1ep", "scale_schedule_ratio": 0.5}
    path = file(json.dumps({"train_batch_size": 4, "engine": run_length}))
    assert run("validate", path)[0] == 0
    assert run("validate", "--steps-per-epoch", 1, path)[0] == 1


def test_plot_reports_a_group_schedule_at_its_own_key(file):
    schedule = {"type": "WarmupDecayLR", "params": {"total_num_steps": 1000, "warmup_num_steps": 9}}
    own = {"type": "WarmupDecayLR", "params": {"total_num_steps": "1ep", "warmup_num_steps": 500}}
    groups = [{"params": "bias", "scheduler": own}]
    config = {"scheduler": schedule, "optimizer": {"type": "SGD", "param_groups": groups}}
    path = file(json.dumps(config, indent=1))
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if ": 500" in text)
    status, out = run("plot", path, "--steps-per-epoch", 100, "-t")
    assert status != 0
    assert f"{path}:{line}:" in out
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if '"1ep"' in text)
    status, out = run("plot", path, "-t")
    assert f"{path}:{line}:" in out


def test_validate_quotes_a_long_line_of_wide_characters_within_its_width(file):
    path = file('{"_c": "' + "語" * 200 + '", "gradient_cliping": 1}')
    _, out = run("validate", path)
    *_, source, caret, _ = out.splitlines()
    before = source[2:].partition('"gradient_cliping"')[0]
    assert caret.index("^") == 2 + count_columns(before)
    assert count_columns(source) <= 102


def test_validate_set_of_an_unknown_section_names_the_option(file):
    path = file('{"train_batch_size": 8}')
    _, out = run("validate", path, "--set", "a.b.c=1")
    problem, summary = out.splitlines()
    assert problem.startswith(
        f"{path}: error[unknown-key]: Unknown key `a`. The value was set by --set."
    )
    assert summary == f"{path}: 1 error"


@pytest.mark.parametrize("name", ["link.json", "directory/c.json"])
def test_validate_dangling_link_names_its_target(tmp_path, name):
    (tmp_path / "link.json").symlink_to("none.json")
    (tmp_path / "directory").symlink_to("none.json")
    status, out = run("validate", tmp_path / name)
    assert status == 2
    assert f"is a symbolic link to {tmp_path / 'none.json'}, which does not exist." in out
    assert "Did you mean" not in out
    assert "Did you mean" not in run("validate", tmp_path / "other.json")[1]
