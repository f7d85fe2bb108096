"""Serve a page of `onecycle ui`, and open it in a headless Chromium."""

import contextlib
import os
import shutil
import threading
import time

import pytest

from engine.ui.server import start_server

PATIENCE = 30  # seconds, on a machine that runs other tests


def needs_browser():
    """Return a pytest mark that skips a test without Chromium, unless REQUIRE_LAB is 1."""
    absent = [tool for tool in ("chromium", "chromedriver") if shutil.which(tool) is None]
    reason = "" if os.environ.get("REQUIRE_LAB") == "1" or not absent else ", ".join(absent)
    return pytest.mark.skipif(
        bool(reason),
        reason=f"NO BROWSER: {reason} not installed (Debian: chromium, chromium-driver)",
    )


@contextlib.contextmanager
def open_browser(width=1280, height=800):
    """Start a headless Chromium with an empty profile."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        resize(browser, width, height)
        yield browser
    finally:
        browser.quit()


def resize(browser, width, height):
    """Set the size of the page, without the browser's own bars."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def set_theme(browser, theme):
    """Make the system's theme "light" or "dark"."""
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@contextlib.contextmanager
def serve(page):
    """Serve a page in a thread, and return its address."""
    server, address = start_server(page, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def wait_for(browser, script, *arguments):
    """Wait until a JavaScript expression is true, and return its value."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if value := browser.execute_script(f"return {script}", *arguments):
            return value
        time.sleep(0.05)
    messages = browser.get_log("browser")
    raise AssertionError(f"{script} did not become true within {PATIENCE} s; console: {messages}")


def read_console(browser):
    """Return the errors and warnings in the browser's console since the last call."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] != "INFO"]
