"""The command `onecycle ui`."""

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from engine.ui.config_file import ConfigFile
from engine.ui.config_page import ConfigPage
from tests.testing.browser import serve


def start(*arguments, **options):
    command = [sys.executable, "-m", "engine.cli.main", "ui", "--no-browser", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options)


def fetch(address, action=None):
    if action is None:
        request = urllib.request.Request(address)
    else:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}api/{action}", b"{}", headers)
    with urllib.request.urlopen(request, timeout=30) as reply:
        return reply.read().decode()


@pytest.mark.parametrize("kind", ["config", "new config", "run"])
def test_command_prints_the_address_and_ends_with_ctrl_c(tmp_path, kind):
    path = tmp_path if kind == "run" else tmp_path / "ds_config.json"
    if kind == "config":
        path.write_text('{"train_batch_size": 8}')
    with start(path) as process:
        address = re.search(r"http://127\.0\.0\.1:\d+/\S+/", process.stdout.readline())[0]
        page = fetch(address)
        assert ("run.js" if kind == "run" else "config.js") in page
        for name in re.findall(r'(?:src|href)="(\w+\.\w+)"', page):
            assert fetch(f"{address}{name}")
        if kind != "run":
            text = json.loads(fetch(address, "open"))["text"]
            assert json.loads(text)["train_batch_size"] == (8 if kind == "config" else 32)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert kind != "new config" or not path.exists()


@pytest.mark.parametrize("kind", ["large", "two configs", "no directory"])
def test_unusable_path_is_an_error(tmp_path, kind):
    path = tmp_path / "ds_config.json"
    path.write_text(" " * 1_000_001 if kind == "large" else "{}")
    paths = {"large": [path], "two configs": [path, path], "no directory": [path / "x"]}[kind]
    with start(*paths) as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("onecycle: ")


def test_port_in_use_is_an_error(tmp_path):
    with serve(ConfigPage(ConfigFile(tmp_path / "c.json"))) as address:
        port = address.split(":")[2].partition("/")[0]
        with start("--port", port, tmp_path) as process:
            _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert f"Port {port} cannot be used: Address already in use." in err


def test_port_out_of_range_is_an_error(tmp_path):
    with start("--port", "70000", tmp_path) as process:
        _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "`--port` must be between 0 and 65535, got 70000." in err


def test_address_without_the_token_is_not_found(tmp_path):
    with serve(ConfigPage(ConfigFile(tmp_path / "c.json"))) as address:
        origin = re.match(r"http://[^/]+/", address)[0]
        for path in ("", "api/open", "x/api/open"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                fetch(f"{origin}{path}")
