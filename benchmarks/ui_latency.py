"""Measure how long `onecycle ui` takes to update the problem list and plots after a keystroke.

    python benchmarks/ui_latency.py

Headless Chromium types digits into a config. Each measurement starts at the timestamp of the key
event, and ends when the browser has rendered the server's reply. Requires chromium and
chromedriver.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.ui.config_file import ConfigFile
from engine.ui.config_page import ConfigPage
from tests.testing.browser import open_browser, serve, wait_for
from tests.testing.schedule_instances import TUTORIAL

CONFIG = {
    "train_batch_size": 32,
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
    "scheduler": TUTORIAL,
}
"""Config with the scheduler block of DeepSpeed's 1Cycle tutorial."""
CORPUS = ROOT / "tests" / "corpus"
WARM_UP = 5
PAUSE = 0.4  # seconds
LISTEN = """
addEventListener('keydown', (event) => { window.pressed = event.timeStamp; }, true);
window.times = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) {
    if (entry.name === 'redraw') times.push(entry.startTime + entry.duration - pressed);
  }
}).observe({ entryTypes: ['measure'] });
"""


def find_largest() -> Path:
    """Return the path of the largest config in the test corpus that has a scheduler block."""
    paths = sorted(CORPUS.glob("*/*.json"), key=lambda path: path.stat().st_size, reverse=True)
    return next(path for path in paths if '"scheduler"' in path.read_text())


def measure(text: str, steps: int | None, rounds: int) -> Iterator[float]:
    """Type into a config in the UI, and yield the latency of each keystroke in milliseconds.

    Args:
        text: text of the config.
        steps: number of steps to plot; None for the default.
        rounds: number of keystrokes.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "ds_config.json")
        path.write_text(text)
        with serve(ConfigPage(ConfigFile(path))) as address, open_browser() as browser:
            browser.get(address)
            wait_for(browser, "document.querySelector('.plot canvas')")
            if steps:
                browser.find_element(By.ID, "steps").send_keys(str(steps))
                wait_for(browser, f"document.querySelector('#steps').placeholder === '{steps:,}'")
            line = browser.find_element(By.CSS_SELECTOR, ".cm-line:nth-child(2)")
            line.click()
            ActionChains(browser).send_keys(Keys.END, Keys.ARROW_LEFT).perform()
            browser.execute_script(LISTEN)
            for index in range(rounds):
                ActionChains(browser).send_keys(Keys.BACKSPACE if index % 2 else "0").perform()
                # Commands to the browser during the reply would count as its time.
                time.sleep(PAUSE)
                wait_for(browser, f"times.length > {index}")
            yield from browser.execute_script("return times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    largest = find_largest()
    cases = [
        ("DeepSpeed's tutorial", json.dumps(CONFIG, indent=2), None),
        ("DeepSpeed's tutorial", json.dumps(CONFIG, indent=2), 100_000),
        (f"largest of the corpus ({largest.name})", largest.read_text(), 100_000),
    ]
    print("| config | steps | median ms | 95th percentile ms |")
    print("|---|---|---|---|")
    for name, text, steps in cases:
        # The first keystrokes load modules and compile JavaScript.
        times = sorted(list(measure(text, steps, args.rounds + WARM_UP))[WARM_UP:])
        shown = f"{steps:,}" if steps else "default"
        high = times[int(0.95 * (len(times) - 1))]
        print(f"| {name} | {shown} | {statistics.median(times):.0f} | {high:.0f} |", flush=True)


if __name__ == "__main__":
    main()
