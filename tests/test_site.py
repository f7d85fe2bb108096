"""The documentation site, in headless Chromium: links, console, network and search."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

from tests.testing.browser import needs_browser, open_browser, read_console, wait_for

ROOT = Path(__file__).parents[1]
WIDTH = 800  # of the window, in pixels

pytestmark = [pytest.mark.slow, needs_browser()]
if os.environ.get("REQUIRE_LAB") != "1":
    for package in ("selenium", "zensical"):
        pytest.importorskip(package, reason=f"{package} is not installed; `make docs` installs it")

READ_PAGE = """
return [
  [...document.images].filter(image => !image.naturalWidth).map(image => image.src),
  performance.getEntriesByType("resource").map(entry => entry.name),
  document.documentElement.scrollWidth - document.documentElement.clientWidth,
];
"""
FIND_RESULT = """
[...document.querySelectorAll("*")].some(
  element => element.shadowRoot?.querySelector('a[href*="PAGE"]')
)
""".strip()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site once, and return its directory."""
    directory = tmp_path_factory.mktemp("site") / "build"
    command = [sys.executable, ROOT / "tools" / "build_site.py", "--output", directory]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return directory / "html"


@pytest.fixture(scope="module")
def address(site):
    """Serve the site, and return the address of its home page."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=site, **pipes) as server:
        port = re.search(r"port (\d+)", server.stdout.readline())[1]
        yield f"http://127.0.0.1:{port}/"
        server.terminate()


@pytest.fixture(scope="module")
def browser():
    with open_browser(WIDTH) as opened:
        yield opened


class PageParser(HTMLParser):
    """Collects the links and the ids of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.ids = set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, _, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.add(value)
            elif name in {"href", "src"}:
                self.links.add(value)


def test_links_lead_to_existing_pages_and_anchors(site):
    pages = {path.resolve(): PageParser(path) for path in site.rglob("*.html")}
    assert len(pages) > 50
    dead = []
    for path, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(link)
            if urlsplit(target).scheme or target.startswith("/"):  # 404.html has absolute links
                continue
            found = (path.parent / unquote(target)).resolve() if target else path
            found = found / "index.html" if found.is_dir() else found
            is_dead = anchor and found in pages and unquote(anchor) not in pages[found].ids
            if is_dead or not found.is_file():
                dead.append(f"{path.relative_to(site)}: {link}")
    assert dead == []


def test_pages_load_without_messages_and_fit_the_window(site, address, browser):
    found = []
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix()
        browser.get(address + name)
        images, requests, overflow = browser.execute_script(READ_PAGE)
        found += [f"{name}: {message}" for message in read_console(browser)]
        found += [f"{name}: broken image {image}" for image in images]
        external = (url for url in requests if not url.startswith((address, "data:", "blob:")))
        found += [f"{name}: request to {url}" for url in external]
        if overflow > 0:
            found.append(f"{name}: {overflow} pixels wider than the window")
    assert found == []


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("OneCycle", "schedules/deepspeed"),
        ("distributed evaluation", "guides/evaluation"),
        ("evaluation several ranks", "guides/evaluation"),
        ("multiple nodes", "guides/multi_node"),
        ("layerwise lr decay", "guides/param_groups"),
        ("custom scheduler", "guides/own_schedule"),
        ("custom lr scheduler", "guides/own_schedule"),
        ("multinode", "guides/multi_node"),
        ("LR finder", "guides/learning_rate"),
        ("DeepSpeed compatibility", "drop_in"),
        ("installation", "index"),
        ("evaluate during training", "guides/evaluation"),
        ("custom data loader", "guides/data"),
        ("two machines", "guides/multi_node"),
        ("multi gpu", "guides/multi_node"),
        ("resume on a different number of GPUs", "guides/checkpoints"),
        ("resume different number of ranks", "guides/checkpoints"),
        ("load a checkpoint for inference", "guides/checkpoints"),
        ("start from scratch instead of resuming", "guides/checkpoints"),
        ("the loss is NaN", "guides/troubleshooting"),
        ("early stopping", "guides/evaluation"),
        ("how do I evaluate", "guides/evaluation"),
        ("evaluate on test set", "guides/evaluation"),
        ("test set", "guides/evaluation"),
        ("validation set", "guides/evaluation"),
        ("freeze layers", "guides/training_loops"),
        ("unfreeze layers", "guides/training_loops"),
        ("write my own schedule", "guides/own_schedule"),
        ("how many steps per epoch", "guides/schedules"),
        ("use my own DataLoader", "guides/data"),
        ("gradient accumulation", "guides/batch_size"),
        ("accumulate gradients over several batches", "guides/batch_size"),
        ("can I use my existing DataLoader?", "guides/data"),
        ("how to log to wandb", "guides/monitors"),
        ("run on 2 machines", "guides/multi_node"),
        ("lower learning rate for earlier layers", "guides/param_groups"),
        ("scheduled weight decay", "guides/param_groups"),
        ("does it work with the Hugging Face Trainer?", "from/transformers"),
        ("how to stop early", "guides/evaluation"),
        ("resume training after a crash", "guides/checkpoints"),
        ("Can I use this with the HF Trainer?", "from/transformers"),
        ("save a checkpoint every epoch", "guides/checkpoints"),
        ("custom schedule", "guides/own_schedule"),
        ("optimizer.step", "guides/troubleshooting"),
    ],
)
def test_search_finds_a_page(address, browser, words, page):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.get(address)
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.CONTROL, "k")
    wait_for(browser, "document.activeElement !== document.body")
    browser.switch_to.active_element.send_keys(words)
    wait_for(browser, FIND_RESULT.replace("PAGE", f"{page}.html"))
    assert read_console(browser) == []
