"""Uploads by the hub's own client, to a server of this process."""

import base64
import http.server
import json
import threading
import urllib.parse

import pytest

from train import __main__ as program


class _Hub(http.server.ThreadingHTTPServer):
  """Answers what `create_repo` and `upload_folder` ask, and keeps it."""

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.status = 200
    self.created, self.files = [], {}
    self.tokens = set()

  @property
  def address(self):
    return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
  server: _Hub

  def _answer(self, value):
    body = json.dumps(value).encode()
    self.send_response(self.server.status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def do_GET(self):
    self._answer({"id": "me/model", "sha": "0" * 40, "siblings": []})

  def do_POST(self):
    body = self.rfile.read(int(self.headers["Content-Length"]))
    path = urllib.parse.urlparse(self.path).path
    hub = self.server
    hub.tokens.add(self.headers.get("Authorization"))
    if hub.status != 200:
      self._answer({"error": "no"})
    elif path == "/api/repos/create":
      hub.created.append(json.loads(body))
      self._answer({"url": f"{hub.address}/me/model"})
    elif "/preupload/" in path:
      self._answer(
        {
          "files": [
            {"path": x["path"], "uploadMode": "regular", "shouldIgnore": False}
            for x in json.loads(body)["files"]
          ]
        }
      )
    elif "/commit/" in path:
      for line in map(json.loads, body.decode().splitlines()):
        if line["key"] == "file":
          value = line["value"]
          content = base64.b64decode(value["content"])
          hub.files[value["path"]] = content
      self._answer(
        {
          "commitUrl": f"{hub.address}/me/model/commit/0",
          "commitOid": "0" * 40,
          "success": True,
        }
      )
    else:
      self._answer({})

  def log_message(self, *arguments):
    pass


@pytest.fixture
def hub(monkeypatch):
  with _Hub() as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "a-token")
    yield server
    server.shutdown()


def _export(folder, out, *more):
  base = ("--base-model", "some/base", "--push-to-hub", "me/model")
  return program.main(
    ["export", "--run", str(folder), "--out", str(out), *base, *more]
  )


def test_an_export_is_uploaded_as_it_is(hub, finished_by, tmp_path, capsys):
  out = tmp_path / "out"
  assert _export(finished_by("lora"), out, "--private") == 0
  assert f"{hub.address}/me/model has it." in capsys.readouterr().out
  (created,) = hub.created
  assert (created["organization"], created["name"]) == ("me", "model")
  assert created["visibility"] == "private"
  assert hub.tokens == {"Bearer a-token"}
  assert hub.files == {x.name: x.read_bytes() for x in out.iterdir()}
  card = hub.files["README.md"].decode()
  assert "base, folder = 'some/base', 'me/model'" in card
  assert str(tmp_path) not in card


def test_what_the_hub_refuses_is_said_in_a_sentence(
  hub, finished_by, tmp_path, capsys, monkeypatch
):
  hub.status = 401
  capsys.readouterr()
  assert _export(finished_by("lora"), tmp_path / "a") == 2
  error = capsys.readouterr().err
  assert "401" in error and "HF_TOKEN" in error and len(error.splitlines()) == 1
  assert (tmp_path / "a" / "README.md").is_file()
  # Nobody listens there.
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
  assert _export(finished_by("lora"), tmp_path / "b") == 1
  error = capsys.readouterr().err
  assert "cannot be reached" in error and len(error.splitlines()) == 1
  assert _export(finished_by("lora"), tmp_path / "c", "--push-to-hub", "x") == 2
  assert "as user/name; got 'x'" in capsys.readouterr().err
