"""`python -m train compile`, for the CPU devices here and without a TPU."""

import importlib.util
import json
import re
import types

import pytest

from train import __main__ as program
from train.errors import UsageError
from train.planning import topology

LAYERS, WIDTH, INNER, VOCABULARY = 2, 32, 64, 128
ROWS, LENGTH, RANK = 16, 8, 2

without_cuda = importlib.util.find_spec("jax_cuda12_plugin") is None
with_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu, the compiler for TPUs, is not installed",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A folder with a config.json, and no weights."""
  folder = tmp_path_factory.mktemp("model")
  sizes = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": INNER,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
  }
  (folder / "config.json").write_text(json.dumps(sizes))
  return folder


@pytest.fixture(scope="module")
def compiles(model):
  """Runs the command on that model; `compiles(*options)`."""

  def run(*options):
    return program.main(
      [
        *("compile", "--model", str(model)),
        *("--batch-size", str(ROWS), "--max-length", str(LENGTH)),
        *("--rank", str(RANK), "--auxiliary-rank", str(RANK), *options),
      ]
    )

  return run


@pytest.fixture(scope="module")
def found(compiles, tmp_path_factory):
  """The figures of LoRA and of LoRA-SAM on eight devices."""
  path = tmp_path_factory.mktemp("figures") / "figures.json"
  methods = ("--method", "lora,lora_sam")
  assert compiles("--mesh", "fsdp=8", *methods, "--json", str(path)) == 0
  return json.loads(path.read_text())["figures"]


def test_arguments_are_the_parts_of_all_arrays_that_a_device_has(found):
  kernels = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER
  split = LAYERS * kernels + 2 * VOCABULARY * WIDTH
  whole = (2 * LAYERS + 1) * WIDTH  # the norms
  factors = LAYERS * RANK * (11 * WIDTH + 3 * INNER)
  batch = 4 * ROWS * LENGTH + ROWS
  assert found[0]["arguments"] == pytest.approx(
    2 * (split / 8 + whole)  # bfloat16
    + 3 * 4 * factors / 8  # float32, with Adam's two moments
    + 4 * batch / 8,
    abs=64,  # the counters
  )


def test_sam_takes_two_gradients_and_no_memory_that_stays(found):
  lora, sam = found
  assert sam["flops"] / lora["flops"] == pytest.approx(2.0, abs=0.05)
  assert sam["arguments"] == lora["arguments"]
  for kind, sent in lora["bytes_sent"].items():
    assert sam["bytes_sent"][kind] == pytest.approx(2 * sent, rel=0.3), kind


def test_operations_are_those_of_the_equations(found):
  tokens = ROWS * LENGTH / 8
  kernels = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
  # Forwards, again, and backwards to the activations; nothing of it is done
  # again in the head, and the rest is small.
  least = 2 * tokens * (3 * kernels + 2 * VOCABULARY * WIDTH)
  assert least < found[0]["flops"] < 1.5 * least


@pytest.mark.parametrize(
  ("options", "parts"),
  [
    (("--model", "llama9"), ("llama3.1-8b", "got 'llama9'")),
    (("--method", "lora,loar"), ("lora_sam", "got 'loar'")),
    (("--mesh", "fsdp=3"), ("asks for 3 devices; there are 8",)),
    (("--mesh", "fsdp=8", "--batch-size", "12"), ("multiple", "got 12")),
    (("--max-length", "65"), ("at most 64", "got 65")),
    (
      ("--mesh", "fsdp=4,context=2", "--max-length", "9"),
      ("context=2", "must divide the tokens", "rows of 9"),
    ),
    (("--rank", "0"), ("--rank must be at least 1; got 0",)),
    (("--targets", "nothing"), ("match no module", "q_proj")),
    (("--json", "/no/such/folder/x"), ("/no/such/folder/x", "does not exist")),
  ],
)
def test_what_cannot_be_compiled_is_told_in_a_sentence(
  compiles, capsys, options, parts
):
  assert compiles(*options) == 2
  lines = capsys.readouterr().err.splitlines()
  assert lines[-1].startswith("error: ")
  assert lines[-1].endswith(".")
  for part in parts:
    assert part in lines[-1]


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is not None,
  reason="libtpu, that this error is about the want of, is installed",
)
def test_without_libtpu_it_is_said_how_to_install_it(compiles, capsys):
  assert compiles("--topology", "v5e:4x4", "--mesh", "fsdp=16") == 2
  assert "pip install 'jax[tpu]'" in capsys.readouterr().err


@with_libtpu
@pytest.mark.parametrize(
  ("topology", "mesh", "part"),
  [
    ("v9:4x4", "fsdp=16", "there is no topology 'v9:4x4'; there are v4:2x2x4"),
    ("v5e:3x3", "fsdp=9", "there is no topology 'v5e:3x3'; there are v4:2x2x4"),
    ("v5e:4x4", "fsdp=8", "asks for 8 devices; there are 16, of the kind TPU"),
    ("v5e:4x4", "", "needs a --mesh of its devices, for example fsdp=16"),
  ],
)
def test_a_topology_that_cannot_be_is_refused(
  compiles, capsys, topology, mesh, part
):
  assert compiles("--topology", topology, "--mesh", mesh) == 2
  assert part in capsys.readouterr().err


@with_libtpu
@pytest.mark.slow
def test_a_step_is_compiled_for_tpus_without_one(compiles, capsys, tmp_path):
  path = tmp_path / "figures.json"
  place = ("--topology", "v5e:2x4", "--mesh", "fsdp=4,tensor=2")
  assert compiles(*place, "--json", str(path)) == 0
  out = capsys.readouterr().out
  assert "8 x TPU v5 lite" in out
  assert "Fits: a program may use 15.750 GiB of a device." in out
  lora, bilora = json.loads(path.read_text())["figures"]
  assert lora["bytes_sent"]["all-gather"] > 0
  assert lora["loops_known"]
  assert bilora["arguments"] > lora["arguments"]


@with_libtpu
@pytest.mark.slow
def test_on_tpus_no_scores_of_long_rows_are_kept(model, compiles, tmp_path):
  """Splash attention, by the compiler's plan."""
  length, heads, devices = 4096, 4, 8
  sizes = json.loads((model / "config.json").read_text())
  long = tmp_path / "model"
  long.mkdir()
  (long / "config.json").write_text(
    json.dumps(sizes | {"max_position_embeddings": length})
  )
  path = tmp_path / "figures.json"
  place = ("--topology", "v5e:2x4", "--mesh", "fsdp=8", "--method", "lora")
  rows = ("--batch-size", str(devices), "--max-length", str(length))
  own = ("--model", str(long), "--json", str(path))
  assert compiles(*place, *rows, *own) == 0
  (lora,) = json.loads(path.read_text())["figures"]
  # A row is on each device; its scores alone would be float32.
  assert lora["temporary"] < 4 * heads * length**2


@with_libtpu
@pytest.mark.slow
def test_what_waits_in_the_host_s_memory_is_not_the_device_s(
  compiles, tmp_path
):
  path = tmp_path / "figures.json"
  place = ("--topology", "v5e:2x4", "--mesh", "fsdp=4,context=2")
  rows = ("--batch-size", "64", "--max-length", "64", "--method", "lora")
  found = {}
  for remat in ("dots", "offload"):
    more = ("--remat", remat, "--json", str(path))
    assert compiles(*place, *rows, *more) == 0
    (found[remat],) = json.loads(path.read_text())["figures"]
  assert found["dots"]["host"] == 0
  # Of each token and layer at least the products of four projections.
  tokens = 64 * 64 / 8
  assert found["offload"]["host"] >= LAYERS * tokens * 2 * 4 * WIDTH
  # XLA's own peak is less than what the device has to hold.
  assert found["offload"]["peak"] >= found["offload"]["temporary"]


@with_libtpu
@pytest.mark.slow
def test_a_step_that_does_not_fit_is_said_to_need_so_much(compiles, capsys):
  place = ("--topology", "v5e:2x4", "--mesh", "fsdp=8", "--method", "lora")
  rows = ("--batch-size", str(2**21), "--max-length", "64")
  assert compiles(*place, *rows) == 1
  assert re.search(
    r"lora does not fit: it needs \d+\.\d+ GiB, and a program may use 15\.750",
    capsys.readouterr().out,
  )


def test_on_one_device_nothing_is_sent(compiles, tmp_path):
  path = tmp_path / "figures.json"
  full = ("--method", "full", "--base-dtype", "float32")
  assert compiles(*full, "--json", str(path)) == 0
  (found,) = json.loads(path.read_text())["figures"]
  assert set(found["bytes_sent"].values()) == {0}


@pytest.mark.skipif(
  without_cuda, reason="jax-cuda12-plugin, the compiler for GPUs, is not there"
)
@pytest.mark.parametrize("name", ["h200:8", "h100:2x4", "a100:8"])
def test_a_step_is_compiled_for_gpus_that_are_not_there(
  compiles, name, tmp_path, capsys
):
  path = tmp_path / "figures.json"
  options = ("--topology", name, "--mesh", "data=2,fsdp=4")
  assert compiles(*options, "--json", str(path)) == 0
  lora, bilora = json.loads(path.read_text())["figures"]
  assert 0 < lora["arguments"] < bilora["arguments"] < bilora["peak"] < 2**30
  assert lora["bytes_sent"]["all-gather"] > 0
  assert f"8 x NVIDIA {name[:4].upper()}" in capsys.readouterr().out


@pytest.mark.skipif(not without_cuda, reason="jax-cuda12-plugin is there")
def test_the_compiler_for_gpus_is_asked_for_where_it_is_not(compiles, capsys):
  assert compiles("--topology", "h100:8", "--mesh", "fsdp=8") == 2
  assert (
    "--topology h100:8 needs JAX's plugin for CUDA, which works without "
    "a GPU: pip install 'jax[cuda12]'." in capsys.readouterr().err
  )


@pytest.mark.parametrize("name", ["h100:0", "h100", "h300:8", "h100:8x", "h1"])
def test_gpus_that_there_are_not_are_refused(compiles, name, capsys):
  assert compiles("--topology", name, "--mesh", "fsdp=8") == 2
  assert f"as h100:4x8; got --topology {name}." in capsys.readouterr().err


def test_every_gpu_has_a_known_memory():
  files = sorted(topology._GPUS.glob("*.textproto"))
  assert [path.stem for path in files] == ["a100", "h100", "h200"]
  for path in files:
    kind = re.search('device_description_str: "([^"]+)"', path.read_text())
    assert kind and kind[1] in topology._GPU_MEMORY


def test_a_program_has_the_share_of_a_gpu_that_jax_takes(monkeypatch):
  device = types.SimpleNamespace(device_kind="NVIDIA H200")
  name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
  for share, part in ((None, 0.75), ("0.95", 0.95)):
    monkeypatch.delenv(name, raising=False)
    if share is not None:
      monkeypatch.setenv(name, share)
    assert topology.memory(device) == int(part * 140.40 * topology.GIB)
  for share in ("most", "1.5", "0"):
    monkeypatch.setenv(name, share)
    with pytest.raises(UsageError, match=rf"at most 1; got '{share}'"):
      topology.memory(device)
