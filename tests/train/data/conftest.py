"""Original files in their true format, and no network, for the tasks' tests."""

from collections.abc import Callable, Mapping
import pathlib
import urllib.error
import urllib.request
import zipfile

import pytest
from tensorflow_datasets.core.download import checksums
import tensorflow_datasets.text.glue as glue

from train.data import pipeline
from train.data import registry as tasks

Put = Callable[[str, Mapping[str, str]], pathlib.Path]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
  def refuse(url: str, timeout: float) -> None:
    raise urllib.error.URLError("no network in tests")

  monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture(scope="session")
def snippets_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("snippets")
  pipeline.load(tasks.get("snippets"), "train", folder)
  return folder


@pytest.fixture
def put(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Put:
  """Puts a task's original files by hand, and has TFDS know their checksums."""

  def put_files(name: str, files: Mapping[str, str]) -> pathlib.Path:
    folder = tmp_path / "originals"
    folder.mkdir(exist_ok=True)
    source = tasks.get(name).source
    assert source is not None
    for file, url in source.originals:
      path = folder / file
      if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
          for member, text in files.items():
            archive.writestr(member, text)
      else:
        path.write_text(files[file], encoding="utf-8")
      info = checksums.compute_url_info(path)
      for known in (checksums.get_all_url_infos(), glue.Glue.url_infos or {}):
        monkeypatch.setitem(known, url, info)
    return tmp_path

  return put_files
