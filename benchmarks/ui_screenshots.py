"""Take the screenshots for docs/guides/ui.md.

    python benchmarks/ui_screenshots.py

Requires chromium and chromedriver. The script also trains two small models, whose metrics are
shown in the screenshot ``ui_run.png``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.ui.config_file import ConfigFile
from engine.ui.config_page import ConfigPage
from engine.ui.run_page import RunPage
from engine.ui.server import Page
from tests.testing.browser import open_browser, resize, serve, set_theme, wait_for

PICTURES = ROOT / "docs" / "pictures"
EXAMPLE = ROOT / "examples" / "fashion_mnist" / "ds_config.json"
TRAINING = """
import json, sys, torch, engine
directory, lr = sys.argv[1], float(sys.argv[2])
torch.manual_seed(0)
config = {
    "train_batch_size": 32,
    "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}},
    "scheduler": {
        "type": "OneCycle",
        "params": {"cycle_min_lr": lr / 10, "cycle_max_lr": lr, "cycle_first_step_size": 150},
    },
    "csv_monitor": {"enabled": True, "output_path": directory, "job_name": "metrics"},
    "engine": {"checkpoint": {"dir": f"{directory}/checkpoints", "every": 100}},
}
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
trainer, *_ = engine.initialize(model=model, config=config)
weights = torch.randn(20, 1)
for _ in range(400):
    inputs = torch.randn(32, 20)
    noise = torch.randn(32, 1)
    trainer.backward((trainer(inputs) - inputs @ weights - noise).pow(2).mean())
    trainer.step()
"""


def shoot(page: Page, name: str, theme: str, size: tuple[int, int], panels: int) -> None:
    """Wait until a page shows ``panels`` charts, then save a screenshot of it in 256 colors."""
    path = PICTURES / name
    with serve(page) as address, open_browser() as browser:
        set_theme(browser, theme)
        resize(browser, *size)
        browser.get(address)
        wait_for(browser, f"document.querySelectorAll('.plot canvas').length >= {panels}")
        time.sleep(2)
        browser.save_screenshot(str(path))
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory, "ds_config.json")
        text = EXAMPLE.read_text().replace("gradient_clipping", "gradient_cliping")
        config.write_text(text)
        shoot(ConfigPage(ConfigFile(config)), "ui_config.png", "light", (1280, 800), 2)
    with tempfile.TemporaryDirectory() as directory:
        roots = [Path(directory, name) for name in ("small_lr", "large_lr")]
        for root, lr in zip(roots, ("0.02", "0.1"), strict=True):
            root.mkdir()
            command = [sys.executable, "-c", TRAINING, str(root), lr]
            subprocess.run(command, check=True, cwd=ROOT)
        shoot(RunPage(roots), "ui_run.png", "dark", (1280, 1240), 6)


if __name__ == "__main__":
    main()
