"""A run's adapters for other programs than PEFT: llama.cpp and vLLM.

The run is one of an older version, on a decoder with its model beside it.
"""

import json
import pathlib
import re
import tarfile

import gguf
import numpy as np
import pytest
import safetensors.numpy

from train import __main__ as program
from train.finished import finished
from train.models.io import gguf_adapter

ARCHIVE = pathlib.Path(__file__).parents[1] / "old_runs.tar.gz"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs")
  with tarfile.open(ARCHIVE) as file:
    file.extractall(folder, filter="data")
  return folder


@pytest.fixture(scope="module")
def exported(runs):
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(runs)
    options = ("--run", "decoder-whole", "--out", "out", "--gguf")
    assert program.main(["export", *options, "--base-model", "decoder"]) == 0
    return runs / "out", finished.open_run("decoder-whole")


def _tensors(folder):
  return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def _stored(weight, heads):
  """Rows of q and k as llama.cpp's converter has them of a Llama."""
  if heads is None:
    return weight
  rows, columns = weight.shape
  halves = weight.reshape(heads, 2, rows // heads // 2, columns)
  return halves.swapaxes(1, 2).reshape(rows, columns)


def _products(reader):
  """What llama.cpp adds to each weight: `alpha / rank * b a`."""
  alpha = reader.fields["adapter.lora.alpha"].contents()
  data = {x.name: np.asarray(x.data) for x in reader.tensors}
  return {
    name.removesuffix(".lora_a"): alpha
    / len(a)
    * data[name.replace("lora_a", "lora_b")]
    @ a
    for name, a in data.items()
    if name.endswith("lora_a")
  }


def test_llama_cpp_adds_what_was_trained(exported):
  folder, run = exported
  reader = gguf.GGUFReader(folder / "adapter.gguf")
  said = {key: field.contents() for key, field in reader.fields.items()}
  assert said["general.architecture"] == "llama"
  assert (said["general.type"], said["adapter.type"]) == ("adapter", "lora")
  found = _products(reader)
  # The gguf package's own names.
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)
  heads = {
    "q_proj": run.model.config.num_heads,
    "k_proj": run.model.config.num_kv_heads,
  }
  tensors, seen = _tensors(folder), set()
  config = json.loads((folder / "adapter_config.json").read_text())
  scale = config["lora_alpha"] / config["r"]
  for name, a in tensors.items():
    if ".lora_A." not in name:
      continue
    b = tensors[name.replace("lora_A", "lora_B")]
    module = name.removeprefix("base_model.model.").removesuffix(
      ".lora_A.weight"
    )
    theirs = f"{names.get_name(module)}.weight"
    wanted = _stored(scale * b @ a, heads.get(module.rpartition(".")[2]))
    np.testing.assert_allclose(found[theirs], wanted, rtol=1e-5, atol=1e-7)
    seen.add(theirs)
  assert seen == set(found)


def test_scales_that_differ_are_in_the_second_factor(tmp_path):
  rng = np.random.default_rng(0)
  pairs = {
    f"model.layers.{i}.mlp.up_proj": (
      rng.normal(size=(rank, 4)).astype(np.float32),
      rng.normal(size=(6, rank)).astype(np.float32),
      scale,
    )
    for i, (rank, scale) in enumerate([(2, 0.5), (3, 7.0)])
  }
  path = tmp_path / "adapter.gguf"
  gguf_adapter.write(path, "qwen2", {"q_proj": 2, "k_proj": 1}, pairs, 16.0)
  found = _products(gguf.GGUFReader(path))
  for i, (a, b, scale) in enumerate(pairs.values()):
    np.testing.assert_allclose(
      found[f"blk.{i}.ffn_up.weight"], scale * b @ a, rtol=1e-5
    )


def test_what_has_no_such_file_is_refused(runs, monkeypatch, capsys, tmp_path):
  monkeypatch.chdir(runs)
  for run, more, part in (
    ("encoder-whole", (), "for the model types llama, mistral"),
    ("decoder-whole", ("--merged",), "convert_hf_to_gguf.py makes a GGUF file"),
  ):
    options = ("--run", run, "--out", str(tmp_path / "no"), "--gguf", *more)
    assert program.main(["export", *options, "--base-model", "x"]) == 2
    assert part in capsys.readouterr().err
  assert not (tmp_path / "no").exists()
  with pytest.raises(ValueError, match=r"no weight for .* model\.rotary"):
    gguf_adapter.write(
      tmp_path / "x", "llama", {}, {"model.rotary": (np.ones(1),) * 3}, 1.0
    )


def test_vllm_reads_the_names_and_the_configuration(exported):
  # Of vllm/lora/utils.py, parse_fine_tuned_lora_name, and
  # vllm/lora/peft_helper.py: no whole modules, no DoRA, and one rank and alpha.
  folder, _ = exported
  pattern = r"base_model\.model\.(.+)\.(lora_[AB]\.weight|lora_embedding_[AB])"
  for name in _tensors(folder):
    assert re.fullmatch(pattern, name), name
  config = json.loads((folder / "adapter_config.json").read_text())
  assert {"r", "lora_alpha", "target_modules"} <= set(config)
  assert not config["modules_to_save"] and not config["use_dora"]
  assert not config["rank_pattern"] and not config["alpha_pattern"]
