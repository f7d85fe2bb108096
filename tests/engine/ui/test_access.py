"""The local server answers only its own page, and reads and writes only the file it was given."""

import socket
import sys

import pytest
from werkzeug.test import Client

from engine.ui.config_file import ConfigFile
from engine.ui.config_page import ConfigPage
from engine.ui.run_page import RunPage
from engine.ui.server import Application, start_server
from tests.testing.browser import serve

LOCAL = "http://127.0.0.1:8000"
TOKEN = "secret"
EXPORT = {"format": "csv", "settings": {}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "project" / "ds_config.json"
    path.parent.mkdir()
    path.write_text('{"train_batch_size": 8}\n')
    return path


@pytest.fixture
def client(path):
    return Client(Application(ConfigPage(ConfigFile(path)), TOKEN))


def post(client, action="open", body=None, base=LOCAL, **options):
    return client.post(f"/{TOKEN}/api/{action}", json=body or {}, base_url=base, **options)


@pytest.mark.parametrize(
    "address", ["/", "/api/open", "/wrong/", "/wrong/api/open", "/secre/", "/secret2/", "/SECRET/"]
)
def test_request_without_the_token_is_not_answered(client, address):
    for reply in (
        client.get(address, base_url=LOCAL),
        client.post(address, base_url=LOCAL, json={}),
    ):
        assert reply.status_code == 404
        assert "train_batch_size" not in reply.text
        assert TOKEN not in reply.text


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "0.0.0.0", "[", ""])
def test_request_for_another_host_name_is_refused(client, host):
    for method in (client.get, client.post):
        reply = method(f"/{TOKEN}/api/open", headers={"Host": host}, json={})
        assert reply.status_code == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9", "https://127.0.0.1:8000"]
)
def test_request_from_another_website_is_refused(client, origin):
    assert post(client, headers={"Origin": origin}).status_code == 403


@pytest.mark.parametrize("base", [LOCAL, "http://localhost:9000"])
def test_request_of_the_page_itself_is_answered_also_through_a_tunnel(client, base):
    reply = post(client, base=base, headers={"Origin": base})
    assert reply.status_code == 200
    assert reply.json["text"] == '{"train_batch_size": 8}\n'


def test_form_of_another_website_cannot_change_the_file(client, path):
    for data in ({"text": "{}"}, b'{"text": "{}", "version": ""}'):
        reply = client.post(f"/{TOKEN}/api/save", data=data, base_url=LOCAL)
        assert reply.status_code == 415
    assert path.read_text() == '{"train_batch_size": 8}\n'


@pytest.mark.parametrize(
    "name",
    ["../pyproject.toml", "%2e%2e/config_page.py", "/etc/passwd", "..\\server.py", "api.js/", "x"],
)
def test_only_the_files_of_the_page_are_served(client, name):
    assert client.get(f"/{TOKEN}/{name}", base_url=LOCAL).status_code == 404


def test_reply_forbids_other_websites_to_embed_or_load_it(client):
    headers = client.get(f"/{TOKEN}/", base_url=LOCAL).headers
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in headers


def test_large_or_malformed_body_is_an_error(client):
    address = f"/{TOKEN}/api/analyze"
    json_type = {"content_type": "application/json", "base_url": LOCAL}
    assert client.post(address, data=b"x" * 9_000_000, **json_type).status_code == 413
    assert client.post(address, data=b"{", **json_type).status_code == 400
    assert client.post(address, data=b"[]", **json_type).status_code == 400
    assert post(client, "analyze", {"text": 3}).status_code == 422
    assert post(client, "analyze", {"text": "{}", "settings": {"steps": -1}}).status_code == 422
    assert post(client, "nothing").status_code == 404


def test_internal_error_is_not_shown_to_the_client(path, monkeypatch, caplog):
    page = ConfigPage(ConfigFile(path))
    monkeypatch.setattr(ConfigFile, "read", lambda _: 1 / 0)
    reply = post(Client(Application(page, TOKEN)))
    assert reply.status_code == 500
    assert "ZeroDivisionError" not in reply.text
    assert "ZeroDivisionError" in caplog.text


def test_server_listens_only_on_the_local_address(path):
    server, address = start_server(ConfigPage(ConfigFile(path)), 0)
    with server:
        assert server.server_address[0] == "127.0.0.1"
        assert address.startswith(f"http://127.0.0.1:{server.port}/")
        assert len(address.split("/")[3]) >= 32
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    with serve(ConfigPage(ConfigFile(path))) as address:
        port = int(address.split(":")[2].split("/")[0])
        for other in others - {"127.0.0.1"}:
            # Debian gives the host name an address such as 127.0.1.1.
            with pytest.raises(OSError), socket.create_connection((other, port), timeout=1):
                pass


def test_token_is_different_for_each_server(path):
    tokens = set()
    for _ in range(3):
        server, address = start_server(ConfigPage(ConfigFile(path)), 0)
        server.server_close()
        tokens.add(address.split("/")[3])
    assert len(tokens) == 3


def test_save_writes_only_the_config_and_its_backup(client, path):
    outside = path.parent.parent / "other.json"
    version = post(client).json["version"]
    body = {
        "text": "{}",
        "version": version,
        "path": str(outside),
        "name": "../other.json",
        "file": str(outside),
    }
    assert post(client, "save", body).status_code == 200
    assert sorted(each.name for each in path.parent.iterdir()) == [
        "ds_config.json",
        "ds_config.json.bak",
    ]
    assert not outside.exists()


def test_comparison_with_a_path_reads_no_file(client, path):
    secret = path.parent / "secret.json"
    secret.write_text('{"scheduler": {"type": "WarmupLR", "params": {}}}')
    compared = [{"label": str(secret), "path": str(secret)}, {"label": "x", "type": str(secret)}]
    scheduler = '{"scheduler": {"type": "WarmupLR", "params": {}}}'
    reply = post(client, "analyze", {"text": scheduler, "compared": compared})
    assert reply.data.count(b"isCompared") == reply.data.count(b'"isCompared": false') == 1


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that reports its import."""
    (tmp_path / "trap_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    assert "trap_module" not in sys.modules


@pytest.mark.parametrize(
    "config",
    [
        '{"scheduler": {"type": "trap_module:Schedule", "params": {}}}',
        '{"optimizer": {"type": "trap_module:O"}, "scheduler": {"type": "WarmupLR"}}',
        '{"scheduler": {"type": "Combined", "params": {"schedulers": [{"type": "trap_module:S"}]}}}',  # noqa: E501
    ],
)
def test_config_that_names_code_is_analyzed_without_importing_it(client, trap, config):
    for offset in range(0, len(config), 7):
        assert post(client, "complete", {"text": config, "offset": offset}).status_code == 200
        assert post(client, "describe", {"text": config, "offset": offset}).status_code == 200
    assert post(client, "analyze", {"text": config}).status_code == 200
    compared = [{"label": "x", "text": config}]
    assert post(client, "analyze", {"text": config, "compared": compared}).status_code == 200
    post(client, "export", {"text": config, **EXPORT})
    post(client, "edit", {"text": config, "type": "OneCycle"})


def test_run_that_names_code_is_shown_without_importing_it(tmp_path, trap):
    (tmp_path / "ds_config.json").write_text('{"scheduler": {"type": "trap_module:Schedule"}}')
    (tmp_path / "train_loss.csv").write_text("step,train_loss\n1,2\n2,3\n")
    client = Client(Application(RunPage([tmp_path]), TOKEN))
    assert post(client, "summary").json["settings"] == [
        {"key": "scheduler.type", "values": ['"trap_module:Schedule"']}
    ]
    assert post(client, "metrics").status_code == 200
    assert post(client, "decision", {"run": tmp_path.name}).json == {"decision": None}


def test_run_page_follows_no_link_out_of_its_directory(tmp_path):
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    run.mkdir()
    (outside / "train_loss.csv").write_text("step,train_loss\n1,2\n")
    (outside / "autowu.png").write_text("secret")
    (run / "link").symlink_to(outside)
    (run / "lr.csv").symlink_to(outside / "train_loss.csv")
    (run / "autowu.png").symlink_to(outside / "autowu.png")
    client = Client(Application(RunPage([run]), TOKEN))
    summary = post(client, "summary").json
    assert summary["plots"] == []
    assert b'"panels": []' in post(client, "metrics").data
    assert post(client, "plot", {"index": 0}).status_code == 422
