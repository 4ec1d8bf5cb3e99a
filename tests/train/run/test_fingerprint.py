"""A run goes on with what it was begun with, or says what has changed."""

import hashlib
import json
import pathlib
import shutil
import signal

import huggingface_hub
import numpy as np
from outcomes import files
import pytest
import safetensors.numpy

from train import __main__ as program
from train.finished.finished import open_run
from train.models.io import weights
from train.run import assemble, fingerprint, journal
from train.run import config as config_lib

_FEW = ("--batch-size", "8", "--max-length", "64", "--epochs", "1")
_STEPS = ("--checkpoint-every", "2", "--eval-every", "3", "--log-every", "3")
_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def begun(tmp_path_factory, tiny_decoder, snippets):
  """What runs on conversations are begun with, and one stopped at step 3."""
  place = tmp_path_factory.mktemp("begun")
  shutil.copytree(tiny_decoder, place / "model")
  rows = [
    {"prompt": f"{i}", "response": x.sentence[:4]}
    for i, x in enumerate(snippets[:40])
  ]
  _write(place / "rows.jsonl", rows)
  (place / "plugin.py").write_text("# nothing\n")
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(place)
    advance = journal.Journal.advance

    def stop(self, now):
      advance(self, now)
      if now == 3:
        signal.raise_signal(signal.SIGTERM)

    patch.setattr(journal.Journal, "advance", stop)
    assert _run() == 0
  assert not (place / "run" / "results.json").exists()
  return place


@pytest.fixture
def place(begun, tmp_path, monkeypatch):
  """A copy of them, which is the current folder."""
  copy = shutil.copytree(begun, tmp_path / "moved")
  monkeypatch.chdir(copy)
  return copy


def _run(*more: str) -> int:
  return program.main(
    [
      *("--task", "instructions", "--data", "rows.jsonl", "--model", "model"),
      *("--run-dir", "run", "--plugins", "plugin.py", *_FEW, *_STEPS),
      *("--no-pack", "--rank", "4", "--no-compilation-cache", *more),
    ]
  )


def _write(path: pathlib.Path, rows) -> None:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _rows(place):
  lines = (place / "rows.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _fewer_rows(place):
  _write(place / "rows.jsonl", _rows(place)[:20])


def _other_rows(place):
  rows = _rows(place)
  _write(place / "rows.jsonl", [x | {"response": "so"} for x in rows])


def _other_weights(place):
  path = place / "model" / "model-00002-of-00002.safetensors"
  found = safetensors.numpy.load_file(path)
  safetensors.numpy.save_file({k: x + 0.5 for k, x in found.items()}, path)


def _other_template(place):
  path = place / "model" / "tokenizer_config.json"
  found = json.loads(path.read_text())
  found["chat_template"] = "Now: " + found["chat_template"]
  path.write_text(json.dumps(found))


def _other_tokenizer(place):
  path = place / "model" / "tokenizer.json"
  found = json.loads(path.read_text())
  found["model"]["merges"] = found["model"]["merges"][:20]
  path.write_text(json.dumps(found))


def _other_sizes(place):
  path = place / "model" / "config.json"
  path.write_text(path.read_text().replace("1e-05", "1e-06"))


def _other_plugin(place):
  (place / "plugin.py").write_text("# something\n")


_CHANGES = {
  "fewer": (
    _fewer_rows,
    "the train rows of --data rows.jsonl (38 then, 18 now)",
  ),
  "rows": (
    _other_rows,
    "the train rows of --data rows.jsonl (38 then, 32 now)",
  ),
  "weights": (
    _other_weights,
    "model-00002-of-00002.safetensors of --model model.",
  ),
  "template": (_other_template, "the chat template of --model model."),
  "tokenizer": (_other_tokenizer, "tokenizer.json of --model model ("),
  "sizes": (_other_sizes, "config.json of --model model."),
  "plugin": (_other_plugin, "plugin.py of --plugins ("),
}


@pytest.mark.parametrize("name", _CHANGES)
def test_what_has_changed_is_named_and_nothing_is_written(place, capsys, name):
  change, named = _CHANGES[name]
  change(place)
  before = files(place)
  assert _run() == 2
  said = capsys.readouterr().err
  assert f"what run was begun with has changed since step 3: {named}" in said
  assert "--accept-changes" in said and "Traceback" not in said
  assert files(place) == before


def test_changes_may_be_accepted_and_fewer_rows_are_fewer_steps(place, capsys):
  _fewer_rows(place)
  assert _run("--accept-changes") == 0
  said = capsys.readouterr().out
  assert "has changed since step 3: the train rows of --data" in said
  assert "the run goes on with what is there now" in said


def test_no_option_is_given_by_an_earlier_command(place):
  path = place / "run" / "config.json"
  path.write_text(path.read_text().replace('changes": false', 'changes": true'))
  assert not config_lib.from_run(place / "run").output.accept_changes


def test_a_lost_config_does_not_make_one_run_of_another(place, capsys):
  (place / "run" / "config.json").unlink()
  before = files(place)
  assert _run("--seed", "7") == 2
  said = capsys.readouterr().err
  assert "another configuration: seed is 0 there and 7 here" in said
  assert files(place) == before


def test_what_has_moved_goes_on_and_is_not_put_on_another_model(place, capsys):
  (place / "run" / "config.json").unlink()
  # All of it is at another path than it was begun at.
  assert _run() == 0
  said = capsys.readouterr().out
  assert "resumed after step 3" in said and "has changed" not in said
  _other_weights(place)
  generate = ["generate", "--run", "run", "--prompt", "so"]
  for command in (
    generate,
    ["evaluate", "--run", "run"],
    ["export", "--run", "run", "--out", "out"],
  ):
    assert program.main(command) == 2
    said = capsys.readouterr().err
    assert "the model that run was trained on has changed: model-00002" in said
  assert not (place / "out").exists()
  open_run("run", accept_changes=True)
  # That it is another is what was asked for.
  open_run("run", base="model")


@pytest.mark.parametrize(
  "content", ["{", "[]", '{"model": 5}', '{"model": {"a": 5}}', "\xff"]
)
def test_a_damaged_fingerprint_is_refused(tmp_path, content):
  path = tmp_path / fingerprint.FILE
  path.write_bytes(content.encode("latin-1"))
  with pytest.raises(ValueError, match=f"{path} cannot be read"):
    fingerprint.read(tmp_path)


def test_a_run_stays_at_the_commit_that_it_was_begun_at(
  begun, tiny_decoder, tmp_path, monkeypatch
):
  cache, asked = tmp_path / "hub" / "snapshots", []
  commits = {None: _COMMIT}
  for commit in (_COMMIT, "f" * 40):
    shutil.copytree(tiny_decoder, cache / commit)

  def download(name, revision=None, **_):
    asked.append(revision)
    return str(cache / commits.get(revision, revision))

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  monkeypatch.chdir(begun)
  folder = tmp_path / "run"
  config = config_lib.replace(
    config_lib.from_run(begun / "run"), model="org/tiny", run_dir=str(folder)
  )
  prepared = assemble.prepare(config)
  assert prepared.fingerprint["commit"] == _COMMIT
  folder.mkdir()
  fingerprint.begin(folder, prepared.fingerprint)
  commits[None] = "f" * 40
  assert assemble.prepare(config).opened.path.name == _COMMIT
  assert asked == [None, _COMMIT]


def test_only_a_snapshot_of_the_hub_has_a_commit(tmp_path):
  assert weights.commit(tmp_path / "snapshots" / _COMMIT) == _COMMIT
  assert weights.commit(tmp_path / _COMMIT) == ""
  assert weights.commit(tmp_path / "snapshots" / "main") == ""


@pytest.fixture
def large(tmp_path, monkeypatch):
  """A file of weights that is too large to be read whole."""
  monkeypatch.setattr(fingerprint, "_WHOLE", 2**10)
  monkeypatch.setattr(fingerprint, "_HEAD", 2**16)
  arrays = {f"layer.{i}": np.zeros(2**18, np.float32) for i in range(8)}
  arrays |= {f"norm.{i}": np.zeros(16, np.float32) for i in range(8)}
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(arrays, path)
  return path, arrays


def test_of_large_files_a_change_of_any_tensor_is_seen(large):
  path, arrays = large
  before = fingerprint._files([path])
  assert fingerprint._files([path]) == before
  for name in arrays:
    changed = {k: x + (k == name) for k, x in arrays.items()}
    changed = {k: x.astype(np.float32) for k, x in changed.items()}
    safetensors.numpy.save_file(changed, path)
    assert fingerprint._files([path]) != before


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
def test_of_a_large_folder_little_is_read(tmp_path, monkeypatch, suffix):
  paths = [tmp_path / f"model-{i}{suffix}" for i in range(4)]
  for path in paths:
    with path.open("wb") as file:
      file.write((100).to_bytes(8, "little") + b"{}".ljust(100))
      file.truncate(4 * 2**30)  # no byte of it is on the disk
  digest, sizes = hashlib.sha256, []

  class Counted:
    def __init__(self):
      self._digest = digest()

    def update(self, part):
      sizes.append(len(part))
      self._digest.update(part)

    def hexdigest(self):
      return self._digest.hexdigest()

  monkeypatch.setattr(hashlib, "sha256", Counted)
  fingerprint._files(paths)
  assert 0 < sum(sizes) < 2**26
