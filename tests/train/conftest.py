"""A tiny BERT in Hugging Face's format, its data, and runs of the program."""

import collections
from collections.abc import Callable
import functools
import json
import os
import pathlib
import string
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import outcomes
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from train import __main__ as program
from train import config as command_line
from train.data import hashing, movie_reviews, pipeline
from train.data import registry as tasks
from train.data.objectives import CLASSIFICATION
from train.run import assemble, journal, step
from train.run import config as config_lib

_REPOSITORY = pathlib.Path(__file__).parents[2]
# One layer: most of the time goes to compilation, by the layer.
_WIDTH, _INNER, _LAYERS, _POSITIONS = 16, 32, 1, 32

Run = Callable[..., int]
Spawn = Callable[..., subprocess.Popen]


@pytest.fixture(scope="session")
def snippets() -> list[movie_reviews.Snippet]:
  """Few enough that an evaluation takes no time, from all of the file."""
  return movie_reviews.read()[::40]


@pytest.fixture(scope="session")
def tiny_model(
  tmp_path_factory: pytest.TempPathFactory,
  snippets: list[movie_reviews.Snippet],
) -> pathlib.Path:
  """A folder with config.json, model.safetensors and tokenizer.json."""
  folder = tmp_path_factory.mktemp("tiny")
  words = collections.Counter(
    word
    for snippet in snippets
    for word in hashing.normalise(snippet.sentence).split()
  )
  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
  vocabulary = special + [word for word, _ in words.most_common(500)]
  ids = {word: i for i, word in enumerate(vocabulary)}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(ids, "[UNK]"))
  tokenizer.normalizer = normalizers.BertNormalizer()
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.post_processor = processors.BertProcessing(
    ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
  )
  tokenizer.save(str(folder / "tokenizer.json"))
  sizes = {
    "model_type": "bert",
    "vocab_size": len(vocabulary),
    "hidden_size": _WIDTH,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": _INNER,
    "max_position_embeddings": _POSITIONS,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
  }
  (folder / "config.json").write_text(json.dumps(sizes))
  safetensors.numpy.save_file(
    _tensors(len(vocabulary)), folder / "model.safetensors"
  )
  return folder


def _tensors(vocabulary: int) -> dict[str, np.ndarray]:
  draws = np.random.default_rng(0)

  def normal(*shape: int) -> np.ndarray:
    return draws.normal(0, 0.3, shape).astype(np.float32)

  tensors = {
    "embeddings.word_embeddings.weight": normal(vocabulary, _WIDTH),
    "embeddings.position_embeddings.weight": normal(_POSITIONS, _WIDTH),
    "embeddings.token_type_embeddings.weight": normal(2, _WIDTH),
  }
  norms = ["embeddings"]
  for i in range(_LAYERS):
    layer = f"encoder.layer.{i}"
    for name, out, into in (
      ("attention.self.query", _WIDTH, _WIDTH),
      ("attention.self.key", _WIDTH, _WIDTH),
      ("attention.self.value", _WIDTH, _WIDTH),
      ("attention.output.dense", _WIDTH, _WIDTH),
      ("intermediate.dense", _INNER, _WIDTH),
      ("output.dense", _WIDTH, _INNER),
    ):
      tensors[f"{layer}.{name}.weight"] = normal(out, into)
      tensors[f"{layer}.{name}.bias"] = normal(out)
    norms += [f"{layer}.attention.output", f"{layer}.output"]
  for norm in norms:
    tensors[f"{norm}.LayerNorm.weight"] = np.ones(_WIDTH, np.float32)
    tensors[f"{norm}.LayerNorm.bias"] = np.zeros(_WIDTH, np.float32)
  return tensors


@pytest.fixture(scope="session")
def tiny_decoder(
  tmp_path_factory: pytest.TempPathFactory,
  snippets: list[movie_reviews.Snippet],
) -> pathlib.Path:
  """A decoder's folder, of Llama's kind, in two shards."""
  folder = tmp_path_factory.mktemp("decoder")
  special = ["<s>", "<|im_start|>", "<|im_end|>"]
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(
    [x.sentence for x in snippets],
    trainers.BpeTrainer(
      vocab_size=400,
      initial_alphabet=alphabet,
      special_tokens=special,
      show_progress=False,
    ),
  )
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"eos_token": special[-1], "chat_template": _CHAT})
  )
  vocabulary = tokenizer.get_vocab_size()
  (folder / "config.json").write_text(
    json.dumps(
      {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
      }
    )
  )
  draws = np.random.default_rng(0)
  found = {
    name: (
      np.ones(shape, np.float32)
      if "norm" in name
      else draws.normal(0, 0.3, shape).astype(np.float32)
    )
    for name, shape in _llama_shapes(vocabulary).items()
  }
  files = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
  shards = {name: files["layers.1." in name] for name in found}
  for file in files:
    safetensors.numpy.save_file(
      {name: x for name, x in found.items() if shards[name] == file},
      folder / file,
    )
  (folder / "model.safetensors.index.json").write_text(
    json.dumps({"metadata": {}, "weight_map": shards})
  )
  return folder


_CHAT = (
  "{% for message in messages %}<|im_start|>{{ message.role }}\n"
  "{{ message.content }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _llama_shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
  shapes: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (vocabulary, 16),
    "model.norm.weight": (16,),
  }
  for i in range(2):
    layer = f"model.layers.{i}"
    for name in ("input_layernorm", "post_attention_layernorm"):
      shapes[f"{layer}.{name}.weight"] = (16,)
    for name, shape in {
      "self_attn.q_proj": (16, 16),
      "self_attn.k_proj": (8, 16),
      "self_attn.v_proj": (8, 16),
      "self_attn.o_proj": (16, 16),
      "mlp.gate_proj": (32, 16),
      "mlp.up_proj": (32, 16),
      "mlp.down_proj": (16, 32),
    }.items():
      shapes[f"{layer}.{name}.weight"] = shape
  return shapes


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A T5's folder, v1.1, of one layer a stack, that reads letters and words."""
  folder = tmp_path_factory.mktemp("t5")
  # As SentencePiece has them. Labels have one token or several.
  pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
  pieces += [(letter, -9.0) for letter in "\u2581" + string.printable[:94]]
  words = "acceptable neutral entailment False classify text the of is"
  pieces += [(f"\u2581{word}", -5.0) for word in words.split()]
  tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, 2, False))
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  tokenizer.decoder = decoders.Metaspace()
  tokenizer.add_special_tokens([piece for piece, _ in pieces[:3]])
  tokenizer.post_processor = processors.TemplateProcessing(
    "$A </s>", "$A </s> $B </s>", [("</s>", 1)]
  )
  tokenizer.save(str(folder / "tokenizer.json"))
  config = {
    "model_type": "t5",
    "vocab_size": 112,  # more than the tokenizer's, as T5's own
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
  }
  (folder / "config.json").write_text(json.dumps(config))
  draws = np.random.default_rng(0)
  found = {
    name: (
      np.ones(shape, np.float32)
      if "norm" in name
      else draws.normal(0, 0.3, shape).astype(np.float32)
    )
    for name, shape in _t5_shapes(config["vocab_size"]).items()
  }
  safetensors.numpy.save_file(found, folder / "model.safetensors")
  return folder


def _t5_shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
  table = (vocabulary, 16)
  shapes = {"shared.weight": table, "lm_head.weight": table}
  for stack, parts in (
    ("encoder", ("SelfAttention", "DenseReluDense")),
    ("decoder", ("SelfAttention", "EncDecAttention", "DenseReluDense")),
  ):
    shapes[f"{stack}.final_layer_norm.weight"] = (16,)
    for i, part in enumerate(parts):
      layer = f"{stack}.block.0.layer.{i}"
      shapes[f"{layer}.layer_norm.weight"] = (16,)
      names = dict.fromkeys("qkv", (12, 16)) | {"o": (16, 12)}
      if part == "DenseReluDense":
        names = {"wi_0": (24, 16), "wi_1": (24, 16), "wo": (16, 24)}
      for name, shape in names.items():
        shapes[f"{layer}.{part}.{name}.weight"] = shape
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    shapes[f"{stack}.{bias}"] = (32, 2)
  return shapes


@pytest.fixture(scope="session")
def data_dir(
  tmp_path_factory: pytest.TempPathFactory,
  snippets: list[movie_reviews.Snippet],
) -> pathlib.Path:
  """The snippets task, prepared once, of few rows."""
  folder = tmp_path_factory.mktemp("data")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(movie_reviews, "read", lambda: snippets)
    patch.setattr(movie_reviews, "TRAIN_ROWS", 128)
    patch.setattr(movie_reviews, "VALIDATION_ROWS", 32)
    pipeline.load(tasks.get("snippets"), "train", folder)
  return folder


@pytest.fixture(scope="session")
def options(tiny_model: pathlib.Path, data_dir: pathlib.Path) -> list[str]:
  """Of a run of 24 steps on the tiny model; later options win."""
  return [
    *("--model", str(tiny_model), "--data-dir", str(data_dir)),
    *("--train-rows", "64", "--batch-size", "8", "--max-length", "16"),
    *("--rank", "4", "--learning-rate", "0.01"),
    *("--checkpoint-every", "5", "--eval-every", "4", "--log-every", "3"),
    # Whoever runs the tests says where compilations are kept.
    *("--group-by-length", "2", "--no-compilation-cache"),
  ]


_NO_ADAPTERS = {"full", "full_sam", "head"}


def _without_adapters(options: list[str]) -> list[str]:
  """The options without `--rank 4`."""
  at = options.index("--rank")
  return [*options[:at], *options[at + 2 :]]


@pytest.fixture(scope="session")
def tiny_config(options: list[str]) -> config_lib.Config:
  return command_line.parse(options)


@pytest.fixture(scope="session")
def run(options: list[str]) -> Run:
  """Runs the program in this process; `run(folder, *options)`."""

  def run_here(folder: pathlib.Path, *more: str) -> int:
    own = _without_adapters(options) if _NO_ADAPTERS & {*more} else options
    return outcomes.main([*own, "--run-dir", str(folder), *more])

  return run_here


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
  """Has a signal come during the step of that number."""

  def install(number, at):
    advance = journal.Journal.advance

    def advance_and_signal(self, now):
      advance(self, now)
      if now == at:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(journal.Journal, "advance", advance_and_signal)

  return install


@pytest.fixture(scope="session")
def spawn(options: list[str]) -> Spawn:
  """Starts the program in a process; `spawn(folder, *options, driver="")`.

  A driver is Python that is run before the program.
  """
  environment = os.environ | {
    # As here: what is compiled is kept by the devices that there are.
    "JAX_NUM_CPU_DEVICES": str(jax.device_count()),
    "PYTHONUNBUFFERED": "1",
  }

  def start(
    folder: pathlib.Path, *more: str, driver: str = ""
  ) -> subprocess.Popen:
    arguments = [*options, "--run-dir", str(folder), *more]
    main = (
      "import sys; from train import __main__; sys.exit(__main__.program())"
    )
    start = ["-c", f"{driver}\n{main}"] if driver else ["-m", "train"]
    return subprocess.Popen(
      [sys.executable, *start, *arguments],
      cwd=_REPOSITORY,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return start


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, options: list[str]):
  """The folder of a finished Bi-LoRA run, plot and all; not to be written."""
  folder = tmp_path_factory.mktemp("finished") / "run"
  assert program.main([*options, "--run-dir", str(folder)]) == 0
  return folder


@pytest.fixture(scope="session")
def finished_by(
  tmp_path_factory: pytest.TempPathFactory, run: Run
) -> Callable[[str], pathlib.Path]:
  """The folder of a short run by a method; not to be written to."""

  @functools.cache
  def trained(method: str) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("by") / method
    few = ("--train-rows", "8", "--eval-rows", "8", "--epochs", "20")
    more = ("--group-by-length", "0", "--log-every", "1", "--eval-every", "20")
    more += ("--checkpoint-every", "20")
    assert run(folder, "--method", method, *few, *more, "--no-baseline") == 0
    return folder

  return trained


@pytest.fixture(scope="session")
def prepared(
  tmp_path_factory: pytest.TempPathFactory, tiny_config: config_lib.Config
) -> Callable[..., assemble.Prepared]:
  """All that is there before the first step; `prepared(**fields)`."""

  @functools.cache
  def prepare_run(**fields: Any) -> assemble.Prepared:
    folder = tmp_path_factory.mktemp("prepared")
    return assemble.prepare(
      config_lib.replace(tiny_config, run_dir=str(folder), **fields)
    )

  return prepare_run


@pytest.fixture(scope="session")
def train_step(
  prepared: Callable[..., assemble.Prepared],
) -> Callable[..., Callable[..., Any]]:
  """The compiled step of `prepared(**fields)`; `train_step(**fields)`."""

  @functools.cache
  def make(**fields: Any) -> Callable[..., Any]:
    return step.make_train_step(prepared(**fields).method, CLASSIFICATION)

  return make


@pytest.fixture(scope="session")
def batch(prepared: Callable[..., assemble.Prepared]) -> pipeline.Batch:
  """The first training batch."""
  ready = prepared()
  return next(
    pipeline.train_batches(
      ready.data.examples["train"], 8, ready.config.optimisation.seed, pad_id=0
    )
  )
