"""The pages of `onecycle ui` in a real browser."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine.ui.config_file import ConfigFile
from engine.ui.config_page import ConfigPage
from engine.ui.run_page import RunPage
from schedules import trace
from tests.testing.browser import needs_browser, open_browser, read_console, serve, wait_for

pytestmark = [pytest.mark.slow, needs_browser()]

ROOT = Path(__file__).parents[3]
CONFIG = """\
{
  "train_batch_size": 32,
  "optimizer": { "type": "SGD", "params": { "lr": 0.1, "momentum": 0.9 } },
  // the cycle of the paper
  "scheduler": {
    "type": "OneCycle",
    "params": {
      "cycle_min_lr": 0.01,
      "cycle_max_lr": 0.1, // the peak
      "cycle_first_step_size": 100
    }
  }
}
"""
SCHEDULER = {
    "type": "OneCycle",
    "params": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 100},
}
IS_DRAWN = "document.querySelectorAll('.plot canvas').length === {}"
ERROR = "document.querySelector('.problem[data-severity=error]')?.innerText"
TEXT = "document.querySelector('.cm-content').innerText"


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def open_config(browser, tmp_path):
    """Open a config with the given bytes; each test must leave the console empty."""
    path = tmp_path / "ds_config.json"
    path.write_bytes(CONFIG.encode())
    with serve(ConfigPage(ConfigFile(path))) as address:

        def start(text=CONFIG, panels=2):
            path.write_bytes(text.encode())
            browser.get(address)
            wait_for(browser, IS_DRAWN.format(panels))
            return path

        yield start
        assert read_console(browser) == []
        # Leave the page, so that it does not ask the closed server for changes.
        browser.execute_script("window.onbeforeunload = null")
        browser.get("about:blank")


def type_keys(browser, *keys, control=False):
    from selenium.webdriver import ActionChains, Keys

    chain = ActionChains(browser)
    if control:
        chain.key_down(Keys.CONTROL)
    chain.send_keys(*keys)
    if control:
        chain.key_up(Keys.CONTROL)
    chain.perform()


def place_cursor(browser, line):
    """Put the cursor at the end of a line of the editor; the first line is 1."""
    from selenium.webdriver import Keys
    from selenium.webdriver.common.by import By

    browser.find_elements(By.CSS_SELECTOR, ".cm-line")[line - 1].click()
    type_keys(browser, Keys.END)


def click(browser, selector):
    from selenium.webdriver.common.by import By

    browser.find_element(By.CSS_SELECTOR, selector).click()


def read_value_at(browser, step):
    """Move the cursor of the charts to a step with the keyboard, and return the values shown."""
    from selenium.webdriver import Keys

    browser.execute_script("document.querySelector('.plot').focus()")
    type_keys(browser, Keys.HOME, *[Keys.ARROW_RIGHT] * step)
    wait_for(
        browser,
        "document.querySelector('.panel-position').textContent.startsWith(arguments[0])",
        f"step {step}",
    )
    values = "[...document.querySelectorAll('.legend b')].map((each) => each.textContent)"
    return [float(value) for value in browser.execute_script(f"return {values}")]


def test_typo_is_reported_at_its_line_and_fixed_with_one_click(browser, open_config):
    open_config()
    place_cursor(browser, 2)
    type_keys(browser, "\n", '"gradient_cliping": 1.0,')
    # While the text is typed, other errors appear.
    problem = wait_for(browser, f"{ERROR}?.includes('gradient_cliping') && {ERROR}")
    assert "line 3" in problem
    marked = wait_for(browser, "document.querySelector('.cm-lintRange-error')?.innerText")
    assert marked == '"gradient_cliping"'
    click(browser, "[data-severity=error] .fix")
    wait_for(browser, "document.querySelector('#summary').textContent.startsWith('Valid')")
    assert '"gradient_clipping": 1.0' in browser.execute_script(f"return {TEXT}")
    expected = trace(SCHEDULER, 101, base={"lr": 0.1, "momentum": 0.9})
    shown = read_value_at(browser, 25)
    assert shown == pytest.approx([expected["lr"][25, 0], expected["momentum"][25, 0]], rel=1e-5)


def test_slider_changes_the_text_and_the_curve_and_keeps_comments(browser, open_config):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    path = open_config()
    before = read_value_at(browser, 50)
    slider = browser.find_element(By.CSS_SELECTOR, "input[type=range][data-param=cycle_max_lr]")
    ActionChains(browser).drag_and_drop_by_offset(slider, 60, 0).perform()
    wait_for(browser, f"!{TEXT}.includes('\"cycle_max_lr\": 0.1, // the peak')")
    wait_for(browser, "!document.querySelector('#dirty').hidden")
    click(browser, "#save")
    wait_for(browser, "document.querySelector('#save').disabled")
    text = path.read_text()
    line = next(line for line in text.splitlines() if "cycle_max_lr" in line)
    value = float(line.split(":")[1].partition(",")[0])
    assert text == CONFIG.replace('"cycle_max_lr": 0.1', f'"cycle_max_lr": {value}')
    changed = {**SCHEDULER, "params": {**SCHEDULER["params"], "cycle_max_lr": value}}
    after = read_value_at(browser, 50)
    assert after[0] != pytest.approx(before[0])
    assert after[0] == pytest.approx(trace(changed, 51)["lr"][50, 0], rel=1e-5)


def test_save_changes_only_the_edited_bytes_and_keeps_a_backup(browser, open_config):
    text = "\ufeff" + CONFIG.replace("\n", "\r\n") + " \t\r\n// end\n"
    path, data = open_config(text), text.encode()
    assert browser.execute_script("return document.querySelector('#save').disabled")
    place_cursor(browser, 2)
    from selenium.webdriver import Keys

    type_keys(browser, Keys.ARROW_LEFT, Keys.BACKSPACE, "4")
    wait_for(browser, "!document.querySelector('#dirty').hidden")
    type_keys(browser, "s", control=True)
    wait_for(browser, "document.querySelector('#dirty').hidden")
    assert path.read_bytes() == data.replace(b'"train_batch_size": 32', b'"train_batch_size": 34')
    assert path.with_name("ds_config.json.bak").read_bytes() == data


def test_keyboard_alone_completes_fixes_and_saves(browser, open_config):
    from selenium.webdriver import Keys

    path = open_config()
    place_cursor(browser, 2)
    type_keys(browser, "\n", '"gradient_clip')
    selected = "document.querySelector('.cm-tooltip-autocomplete [aria-selected]')?.innerText"
    wait_for(browser, f"({selected} ?? '').startsWith('gradient_clipping')")
    time.sleep(0.3)  # CodeMirror ignores Enter just after the list appears
    type_keys(browser, Keys.ENTER)
    wait_for(browser, f"{TEXT}.includes('\"gradient_clipping\": 1.0,')")
    type_keys(browser, "\n", '"prescale_gradient": false,')
    wait_for(browser, "document.querySelector('[data-severity=error] .fix')")
    type_keys(browser, ".", control=True)
    wait_for(browser, f"{TEXT}.includes('\"prescale_gradients\": false')")
    reached = set()
    for _ in range(80):
        type_keys(browser, Keys.TAB)
        reached.add(browser.execute_script("return document.activeElement.id"))
    assert {"save", "theme", "world_size", "log", "by-step", "type", "open-gallery"} <= reached
    assert "param-cycle_max_lr" in reached
    type_keys(browser, "s", control=True)
    wait_for(browser, "document.querySelector('#dirty').hidden")
    assert json.loads("".join(path.read_text().splitlines()[3:4]).join("{}").replace(",}", "}"))
    assert '"prescale_gradients": false' in path.read_text()


def test_broken_text_keeps_the_last_curves_and_recovers(browser, open_config):
    from selenium.webdriver import Keys

    open_config()
    place_cursor(browser, 1)
    type_keys(browser, ",")
    wait_for(browser, "document.querySelector('#charts').classList.contains('is-stale')")
    assert browser.execute_script(f"return {IS_DRAWN.format(2)}")
    type_keys(browser, Keys.BACKSPACE)
    wait_for(browser, "!document.querySelector('#charts').classList.contains('is-stale')")


def test_file_changed_by_another_program_is_noticed(browser, open_config):
    path = open_config()
    changed = CONFIG.replace("32", "64")
    path.write_text(changed)
    wait_for(browser, f"{TEXT}.includes('\"train_batch_size\": 64')")
    place_cursor(browser, 2)
    type_keys(browser, " ")
    path.write_text(changed.replace("64", "128"))
    notice = wait_for(browser, "document.querySelector('#notice:not([hidden])')?.innerText")
    assert "Another program has changed the file." in notice
    type_keys(browser, "s", control=True)
    assert '"train_batch_size": 128' in path.read_text()
    click(browser, "#notice button")
    wait_for(browser, f"{TEXT}.includes('\"train_batch_size\": 128')")


def test_memory_follows_the_number_of_parameters_and_the_stage(browser, open_config):
    from selenium.webdriver.common.by import By

    zero = '"zero_optimization": { "stage": 2 },'
    open_config(
        CONFIG.replace("32,", f"32,\n  {zero}")
        .replace('"SGD"', '"AdamW"')
        .replace(', "momentum": 0.9', "")
    )
    browser.find_element(By.CSS_SELECTOR, "#world_size").send_keys("8")
    browser.find_element(By.CSS_SELECTOR, "#parameters").send_keys("7e9")
    chosen = "document.querySelectorAll('.memory')[1]?.querySelector('.total')?.innerText"
    row = wait_for(browser, f"({chosen} ?? '').includes('GiB') && {chosen}")
    assert row.split("\t")[0] == "2"
    browser.find_element(By.CSS_SELECTOR, "#parameters").send_keys("x")
    wait_for(browser, "document.querySelector('.memory') === null")
    assert (
        browser.execute_script("return document.querySelector('#parameters').ariaInvalid") == "true"
    )


def test_type_from_the_gallery_replaces_the_block(browser, open_config):
    open_config()
    click(browser, "#open-gallery")
    type_keys(browser, "WarmupCosineLR")
    click(browser, ".card:not([hidden])")
    wait_for(browser, f'{TEXT}.includes(\'"type": "WarmupCosineLR"\')')
    assert "// the cycle of the paper" in browser.execute_script(f"return {TEXT}")
    wait_for(browser, IS_DRAWN.format(1))


TRAINING = """
import time, torch, engine
torch.manual_seed(0)
config = {
    "train_batch_size": 4,
    "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
    "csv_monitor": {"enabled": True, "output_path": ".", "job_name": "metrics"},
    "engine": {"checkpoint": {"dir": "checkpoints", "every": 20}},
}
trainer, *_ = engine.initialize(model=torch.nn.Linear(4, 1), config=config)
for step in range(2000):
    trainer.backward(trainer(torch.randn(4, 4)).pow(2).mean())
    trainer.step()
    time.sleep(0.05)
"""


def test_run_that_is_trained_grows_on_the_page(browser, tmp_path):
    (tmp_path / "train.py").write_text(TRAINING)
    command = [sys.executable, "-W", "ignore", "train.py"]
    with (
        serve(RunPage([tmp_path])) as address,
        subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as training,
    ):
        try:
            browser.get(address)
            wait_for(browser, "document.querySelectorAll('.plot canvas').length >= 3")
            bounds = "document.querySelector('#status').textContent"
            wait_for(browser, f"{bounds} === 'Live'")
            wait_for(browser, "document.querySelectorAll('#checkpoints tr').length >= 1")
            first = count_points(browser)
            wait_for(browser, f"({COUNT}) > {first + 20}")
        finally:
            training.kill()
        assert read_console(browser) == []
        browser.get("about:blank")


def test_run_page_shows_the_decision_of_autowu_and_the_range_test(browser, tmp_path):
    losses = [*np.linspace(4, 1, 150), *np.linspace(1, 6, 150)]
    for name, values in (("train_loss", losses), ("step", range(1, 301))):
        rows = [f"{8 * (index + 1)},{value}\n" for index, value in enumerate(values)]
        (tmp_path / f"Train_Samples_{name}.csv").write_text(f"step,{name}\n{''.join(rows)}")
    config = {
        "scheduler": {"type": "AutoWU", "params": {"steps_per_epoch": 20, "total_epochs": 20}}
    }
    (tmp_path / "ds_config.json").write_text(json.dumps(config))
    (tmp_path / "lr_test").mkdir()
    sweep = {"lr": [1e-4, 1e-3, 1e-2, 0.1, 1.0], "loss": [2.0, 1.5, 1.0, 9.0, None]}
    suggestion = {"max_lr": 0.01, "min_lr": 0.001, "rules": {"steepest": 0.001}}
    report = {"suggestion": suggestion, "runs": [sweep]}
    (tmp_path / "lr_test" / "report.json").write_text(json.dumps(report))
    with serve(RunPage([tmp_path])) as address:
        browser.get(address)
        wait_for(browser, "document.querySelector('#decision canvas')")
        text = browser.execute_script("return document.querySelector('#decision-text').innerText")
        assert "The warmup ended after step" in text
        assert browser.execute_script(
            "return document.querySelector('#range-test canvas') !== null"
        )
        text = browser.execute_script("return document.querySelector('#range-test-text').innerText")
        assert "Suggested range: 0.001 to 0.01" in text
        assert read_console(browser) == []
        browser.get("about:blank")


# The rightmost position of the cursor is the last step of the run.
COUNT = """(() => {
  const plot = document.querySelector('.plot');
  plot.dispatchEvent(new KeyboardEvent('keydown', {key: 'End', bubbles: true}));
  return Number(document.querySelector('.panel-position').textContent.replace(/\\D/g, ''));
})()"""


def count_points(browser):
    return browser.execute_script(f"return {COUNT}")


@pytest.mark.parametrize("width", [800, 1280])
def test_page_has_no_horizontal_scrollbar(browser, open_config, width):
    from tests.testing.browser import resize

    resize(browser, width, 900)
    open_config()
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(f"return {overflow}") == 0
    resize(browser, 1280, 800)


def test_curve_of_a_long_run_shows_the_value_of_each_step_after_zooming(browser, open_config):
    config = CONFIG.replace("100\n", "4000000\n")
    open_config(config)
    assert np.isclose(read_value_at(browser, 0)[0], 0.01)
    for _ in range(12):
        type_keys(browser, "+")
    wait_for(browser, "document.querySelector('.panel-position').textContent !== ''")
    first = read_value_at(browser, 7)
    scheduler = json.loads(json.dumps(SCHEDULER).replace("100", "4000000"))
    assert first[0] == pytest.approx(trace(scheduler, 8)["lr"][7, 0], rel=1e-5)
