"""Pages with interactive charts: a single HTML file, drawn by a real browser."""

import json
import math
import re

import pytest

from engine.display.html_charts import Line, Mark, Page, Panel, build_html, read_extra, write_html
from engine.distributed.environment import OK
from schedules import trace
from tests.engine.cli.test_main import run
from tests.testing.browser import needs_browser, open_browser, read_console, wait_for
from tests.testing.schedule_instances import TUTORIAL

LINES = [Line("train", [1.0, math.nan, 3.0]), Line("other", [2, None, math.inf], is_compared=True)]
PAGE = Page("a <b> title", [Panel("loss", "loss", range(3), LINES)], marks=[Mark(1, "here")])


def read_data(html):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)
    return json.loads(found)


def test_page_contains_every_script_and_loads_nothing():
    html = build_html(PAGE)
    assert "{{" not in re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert "default-src 'none'" in html
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(?!data:)", html)
    assert "import {" not in html
    assert "@import" not in html


def test_values_that_are_not_finite_are_gaps():
    (panel,) = read_data(build_html(PAGE))["panels"]
    assert panel["steps"] == [0, 1, 2]
    assert [line["values"] for line in panel["lines"]] == [[1.0, None, 3.0], [2, None, None]]
    assert [line["isCompared"] for line in panel["lines"]] == [False, True]


@pytest.mark.parametrize("text", ["</script><script>alert(1)</script>", "<!--<script>", "\u2028"])
def test_text_cannot_end_the_script_of_the_data(text):
    html = build_html(Page(text, [], config=text))
    data = read_data(html)
    assert (data["title"], data["config"]) == (text, text)
    assert html.count("</script>") == build_html(Page("", [])).count("</script>")


def test_extra_values_are_read_again(tmp_path):
    path = tmp_path / "new" / "page.html"
    write_html(path, PAGE, {"snake_case": [1, None]})
    assert read_extra(path) == {"snake_case": [1, None]}
    assert [each.name for each in path.parent.iterdir()] == ["page.html"]


def test_failed_write_keeps_the_old_page(tmp_path):
    path = tmp_path / "page.html"
    write_html(path, PAGE)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_html(path, PAGE, {"not": object()})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_file_without_data_is_not_a_report(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<p>another page</p>")
    with pytest.raises(ValueError, match=r"page\.html is not a report"):
        read_extra(path)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({"scheduler": TUTORIAL}))
    return path


def test_plot_writes_a_page_with_the_values_of_the_trace(config, tmp_path):
    path = tmp_path / "curves.html"
    status, out, err = run("plot", config, "-o", path)
    assert (status, err) == (OK, "")
    assert out.startswith(f"{path}: ")
    data = read_data(path.read_text())
    expected = trace(TUTORIAL, len(data["panels"][0]["steps"]))
    assert [panel["name"] for panel in data["panels"]] == ["lr", "momentum"]
    for panel in data["panels"]:
        assert panel["lines"][0]["values"] == expected[panel["name"]][:, 0].tolist()
    assert data["marks"][0] == {"position": 0, "name": "first part"}


def test_plot_page_of_a_long_run_is_sampled(config, tmp_path):
    path = tmp_path / "curves.html"
    assert "sampled at 10,000 steps" in run("plot", config, "-o", path, "--steps", 10**6)[1]
    steps = read_data(path.read_text())["panels"][0]["steps"]
    assert (len(steps), steps[-1]) == (10_000, 10**6 - 1)


def test_plot_page_of_recorded_losses_shows_the_decision(tmp_path):
    path, losses = tmp_path / "ds_config.json", tmp_path / "losses.csv"
    params = {"steps_per_epoch": 10, "total_epochs": 20, "test": "robust"}
    path.write_text(json.dumps({"scheduler": {"type": "AutoWU", "params": params}}))
    values = [2 + (step - 60) ** 2 / 4000 for step in range(150)]
    losses.write_text("step,loss\n" + "\n".join(f"{i},{each}" for i, each in enumerate(values)))
    status, _, err = run("plot", path, "--losses", losses, "-o", tmp_path / "curves.html")
    assert (status, err) == (OK, "")
    data = read_data((tmp_path / "curves.html").read_text())
    assert data["decision"]["text"].startswith("The warmup ended after step")
    assert [panel["name"] for panel in data["panels"]] == ["lr", "loss"]


@pytest.mark.slow
@needs_browser()
def test_browser_shows_the_value_under_the_cursor_and_a_logarithmic_axis(config, tmp_path):
    path = tmp_path / "curves.html"
    run("plot", config, "-o", path, "--compare", "CosineAnnealingLR")
    with open_browser() as browser:
        browser.get(path.as_uri())
        wait_for(browser, "document.querySelectorAll('.plot canvas').length === 2")
        plot = browser.find_element("css selector", ".plot")
        plot.send_keys("\ue011")  # the Home key moves the cursor to step 0
        first = trace(TUTORIAL, 1)["lr"][0, 0]
        values = [each.text for each in browser.find_elements("css selector", ".legend b")]
        assert float(values[0]) == pytest.approx(first, rel=1e-5)
        assert browser.find_element("css selector", ".panel-position").text == "step 0"
        browser.find_element("id", "log").click()
        assert browser.find_element("id", "log").get_attribute("aria-pressed") == "true"
        browser.find_element("id", "theme").click()
        assert browser.find_element("id", "theme").text == "Theme: light"
        assert read_console(browser) == []
