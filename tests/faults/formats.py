"""Each format of files that the program reads: a small one, and its reader."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import importlib
import json
import pathlib
from typing import Any

import gguf
import jax
import mutate
import numpy as np
import onnx
from onnx import helper, numpy_helper
import PIL.Image
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

import bilora_jax
from bilora_jax import peft
from train import config as command_line
from train.data import columns, images, instructions
from train.data import options as data_options
from train.data import registry as tasks
from train.finished import finished
from train.models import load, registry
from train.models.bert import weights as bert
from train.models.decoder import weights as decoder
from train.models.io import stored, tokenizer
from train.models.t5 import weights as t5
from train.models.vit import model as vit
from train.models.vit import weights as vit_weights
from train.run import config as config_lib
from train.run import kept, report
from train.run.loggers import jsonl
from train.study import landscape_rows, plan, record, results, spec
from train.study import report as study_report


@dataclasses.dataclass(frozen=True)
class Format:
  """A folder or a file that the program reads.

  Attributes:
    build: writes a small one into an empty folder.
    files: those of its files to damage, and how.
    open: reads it as the program does, and gives what was read.
  """

  build: Callable[[pathlib.Path], None]
  files: Mapping[str, tuple[mutate.Mutator, ...]]
  open: Callable[[pathlib.Path], Any]


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=1))


# Models.

_WORDS = [
  "[PAD]",
  "[UNK]",
  "[CLS]",
  "[SEP]",
  *["a", "good", "bad", "film", "of", "the", "is"],
]
_BERT = {
  "model_type": "bert",
  "vocab_size": len(_WORDS),
  "hidden_size": 4,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "intermediate_size": 6,
  "max_position_embeddings": 16,
  "type_vocab_size": 2,
  "layer_norm_eps": 1e-12,
  "hidden_act": "gelu",
  "position_embedding_type": "absolute",
  "is_decoder": False,
}
_LLAMA = {
  "model_type": "llama",
  "vocab_size": 300,
  "hidden_size": 4,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "head_dim": 2,
  "intermediate_size": 6,
  "max_position_embeddings": 64,
  "rms_norm_eps": 1e-5,
  "tie_word_embeddings": True,
  "hidden_act": "silu",
  "attention_bias": False,
  "layer_types": ["full_attention"],
  "rope_scaling": {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
  },
}
_T5 = {
  "model_type": "t5",
  "vocab_size": 112,
  "d_model": 4,
  "d_kv": 2,
  "d_ff": 6,
  "num_layers": 1,
  "num_decoder_layers": 1,
  "num_heads": 2,
  "feed_forward_proj": "gated-gelu",
  "relative_attention_num_buckets": 8,
  "relative_attention_max_distance": 16,
  "layer_norm_epsilon": 1e-6,
  "is_encoder_decoder": True,
  "pad_token_id": 0,
  "eos_token_id": 1,
  "decoder_start_token_id": 0,
  "tie_word_embeddings": False,
}
_CHAT = (
  "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}"
  "</s>{% endfor %}"
)


def _arrays(plan_of: Mapping[Any, stored.Source]) -> dict[str, np.ndarray]:
  draws = np.random.default_rng(0)
  return {
    name: draws.normal(0, 0.3, source.tensor_shape).astype(np.float32)
    for source in plan_of.values()
    for name in source.names
  }


def _bert(folder: pathlib.Path) -> None:
  tokenizer = tokenizers.Tokenizer(
    models.WordLevel({word: i for i, word in enumerate(_WORDS)}, "[UNK]")
  )
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.post_processor = processors.BertProcessing(
    ("[SEP]", 3), ("[CLS]", 2)
  )
  tokenizer.save(str(folder / "tokenizer.json"))
  _write_json(folder / "config.json", _BERT)
  config = registry.by_model_type("bert").config.from_hf(_BERT)
  tensors = _arrays(bert._plan(config))
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def _llama(folder: pathlib.Path) -> None:
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {word: i for i, word in enumerate([*alphabet, "ab", "abc"])}
  merges = [("a", "b"), ("ab", "c")]
  tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(["<s>", "</s>"])
  tokenizer.save(str(folder / "tokenizer.json"))
  _write_json(folder / "config.json", _LLAMA)
  _write_json(
    folder / "tokenizer_config.json",
    {
      "bos_token": {"content": "<s>", "special": True},
      "eos_token": "</s>",
      "chat_template": [
        {"name": "default", "template": _CHAT},
        {"name": "rag", "template": "a"},
      ],
    },
  )
  _write_json(folder / "generation_config.json", {"eos_token_id": 1})
  config = registry.by_model_type("llama").config.from_hf(_LLAMA)
  tensors = _arrays(decoder._plan(config, False))
  files = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
  shards = {name: files["mlp" in name] for name in tensors}
  for file in files:
    safetensors.numpy.save_file(
      {name: x for name, x in tensors.items() if shards[name] == file},
      folder / file,
    )
  index = {"metadata": {"total_size": 1}, "weight_map": shards}
  _write_json(folder / "model.safetensors.index.json", index)


def _t5(folder: pathlib.Path) -> None:
  pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
  pieces += [(letter, -9.0) for letter in "\u2581abcdefghij"]
  tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, 2, False))
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  tokenizer.decoder = decoders.Metaspace()
  tokenizer.add_special_tokens([piece for piece, _ in pieces[:3]])
  tokenizer.post_processor = processors.TemplateProcessing(
    "$A </s>", "$A </s> $B </s>", [("</s>", 1)]
  )
  tokenizer.save(str(folder / "tokenizer.json"))
  _write_t5(folder)


def _write_t5(folder: pathlib.Path) -> None:
  _write_json(folder / "config.json", _T5)
  config = registry.by_model_type("t5").config.from_hf(_T5)
  tensors = _arrays(t5._plan(config, False, "shared.weight"))
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def _spiece(folder: pathlib.Path) -> None:
  layout: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")

  proto = layout.ModelProto()
  for piece, kind in (("<pad>", 3), ("</s>", 3), ("<unk>", 2)):
    proto.pieces.add(piece=piece, score=0.0, type=kind)
  for piece in "\u2581abcdefg":
    proto.pieces.add(piece=piece, score=-2.0, type=1)
  proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
  proto.trainer_spec.unk_id = 2
  proto.trainer_spec.eos_piece = "</s>"
  proto.normalizer_spec.add_dummy_prefix = True
  proto.normalizer_spec.remove_extra_whitespaces = True
  (folder / "spiece.model").write_bytes(proto.SerializeToString())
  _write_t5(folder)


def _read_model(folder: pathlib.Path) -> Any:
  """All of a model: its sizes, its tokenizer and each of its weights."""
  (path,) = [*folder.glob("*.gguf"), *folder.glob("*.onnx")] or [folder]
  found = load.open_pretrained(str(path))
  if found.family.answers == "head":
    model = found.classifier(2)
  else:
    model = found.language_model()
  params = found.variables(model, place=_on_the_host)
  texts = []
  if found.text_tokenizer is not None:
    with tokenizer.refusing():
      texts = tokenizer.encode(found.tokenizer, ["a good film abc"], 16)
  sizes = [x.nbytes for x in jax.tree.leaves(params)]
  return (
    found.config,
    found.pad_id,
    found.stop_ids,
    found.template,
    texts,
    sizes,
  )


def _on_the_host(path, shape, dtype, read, /):
  return read((slice(None),) * len(shape))


def _gguf(folder: pathlib.Path) -> None:
  writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
  tokens = [*"abcdefghijklmnop", "ab", "<s>", "</s>"]
  for key, value in {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 32,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
  }.items():
    writer.add_uint32(f"llama.{key}", value)
  writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
  writer.add_float32("llama.rope.freq_base", 10000.0)
  writer.add_string("tokenizer.ggml.model", "gpt2")
  writer.add_string("tokenizer.ggml.pre", "smollm")
  writer.add_array("tokenizer.ggml.tokens", tokens)
  writer.add_array("tokenizer.ggml.token_type", [1] * 17 + [3, 3])
  writer.add_array("tokenizer.ggml.merges", ["a b"])
  writer.add_uint32("tokenizer.ggml.bos_token_id", 17)
  writer.add_uint32("tokenizer.ggml.eos_token_id", 18)
  writer.add_bool("tokenizer.ggml.add_bos_token", True)
  writer.add_string("tokenizer.chat_template", _CHAT)
  shapes = {
    "token_embd": (len(tokens), 32),
    "output_norm": (32,),
    "blk.0.attn_q": (32, 32),
    "blk.0.attn_k": (16, 32),
    "blk.0.attn_v": (16, 32),
    "blk.0.attn_output": (32, 32),
    "blk.0.ffn_gate": (32, 32),
    "blk.0.ffn_up": (32, 32),
    "blk.0.ffn_down": (32, 32),
    "blk.0.attn_norm": (32,),
    "blk.0.ffn_norm": (32,),
  }
  draws = np.random.default_rng(0)
  for name, shape in shapes.items():
    value = draws.normal(size=shape).astype(np.float32)
    kind = None
    if len(shape) == 2:
      kind = gguf.GGMLQuantizationType.Q8_0
      value = gguf.quants.quantize(value, kind)
    writer.add_tensor(f"{name}.weight", value, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _onnx(folder: pathlib.Path) -> None:
  config = vit.VitConfig(2, 1, 64, 1, 1, 3)
  shapes = {
    source.names[0]: source.tensor_shape
    for source in vit_weights._plan(config).values()
  }
  nodes, arrays = [], {}
  for name, shape in shapes.items():
    value = np.full(shape, 0.5, np.float32)
    module, _, leaf = name.rpartition(".")
    if leaf == "weight" and value.ndim == 2:
      place = f"/{module.replace('.', '/').replace('layer/', 'layer.')}/MatMul"
      nameless = f"onnx::MatMul_{len(arrays)}"
      nodes.append(helper.make_node("MatMul", ["x", nameless], ["y"], place))
      name, value = nameless, value.T
    arrays[name] = np.ascontiguousarray(value)
  graph = helper.make_graph(
    nodes,
    "dinov2",
    [],
    [],
    [numpy_helper.from_array(value, name) for name, value in arrays.items()],
  )
  onnx.save(helper.make_model(graph), folder / "model.onnx")


# Adapters, and PEFT's.


@functools.cache
def _model() -> tuple[Any, Any, bilora_jax.Adapted]:
  """A tiny BERT, its shapes, and what it is with adapters."""
  config = registry.by_model_type("bert").config.from_hf(_BERT)
  model = registry.by_model_type("bert").classifier(config, 2)
  tokens = jax.ShapeDtypeStruct((1, 2), "int32")
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)
  adapted = bilora_jax.adapt(
    model,
    bilora_jax.LoraSpec(
      rank=2, auxiliary_rank=0, targets="encoder/.*", extra="head/.*"
    ),
    tokens,
    tokens,
  )
  return model, shapes, adapted


@functools.cache
def _factors() -> Any:
  _, shapes, adapted = _model()
  # Without a compilation.
  found = jax.eval_shape(adapted.init, jax.random.key(0), shapes)
  return jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), found)


def _adapters(folder: pathlib.Path) -> None:
  bilora_jax.save_adapters(folder, _model()[2], _factors())


def _read_adapters(folder: pathlib.Path) -> Any:
  found = bilora_jax.load_adapters(folder, _model()[2])
  return bilora_jax.load_spec(folder), jax.tree.map(np.shape, found)


def _peft(folder: pathlib.Path) -> None:
  model, _, adapted = _model()
  kind = registry.family_of(model).kind_of(model)
  peft.save(
    folder,
    adapted,
    _factors(),
    kind.names,
    base_model="a/b",
    task_type="TOKEN_CLS",
  )


def _read_peft(folder: pathlib.Path) -> Any:
  model, _, adapted = _model()
  kind = registry.family_of(model).kind_of(model)
  found = peft.load_spec(folder, kind.names, prefix=kind.prefix)
  loaded = peft.load(folder, adapted, kind.names, prefix=kind.prefix)
  return found, jax.tree.map(np.shape, loaded)


# Runs.


def _run(folder: pathlib.Path) -> None:
  """What a run of Bi-LoRA leaves, of a model in the folder `base`."""
  (folder / "base").mkdir()
  _bert(folder / "base")
  config = command_line.parse(
    ["--model", str(folder / "base"), "--rank", "2", "--max-length", "16"]
  )
  (folder / "config.json").write_text(config_lib.to_json(config))
  task = tasks.get("snippets")
  _write_json(folder / kept.TASK, task.description())
  bilora_jax.save_adapters(folder / kept.ADAPTERS, _model()[2], _factors())
  metrics = {"accuracy": 0.5, "loss": 0.7, "rows": 4, "unit": "rows"}
  metrics |= {"accuracy_95": [0.1, 0.9]}
  _write_json(
    folder / "results.json",
    {
      "command": ["python", "-m", "train"],
      "config": config_lib.flat(config),
      "metric": "accuracy",
      "best_step": 2,
      "validation": 0.5,
      "test": metrics,
      "baseline": metrics,
      "trained_parameters": 100,
      "base_parameters": 1000,
      "steps": 4,
      "stopped_at": None,
      "median_step_seconds": 0.1,
      "median_tokens_per_second": 10.0,
      "peak_host_memory_gib": 0.5,
      "machine": "one",
      "date": "2026-01-01",
    },
  )
  rows = [
    {"step": 1, "loss": 0.7, "accuracy": 0.5, "step_seconds": 0.1},
    {"step": 2, "validation_loss": 0.6, "validation_accuracy": 0.5},
    {"step": 3, "loss": None, "c_over_rho": 1.0},
  ]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "metrics.jsonl").write_text(text)


def _read_run(folder: pathlib.Path) -> Any:
  found = finished.open_run(folder)
  return found.config, found.task, jax.tree.map(np.shape, found.adapters)


def _read_texts_of_run(folder: pathlib.Path) -> Any:
  """The small files, without the model."""
  config = config_lib.from_run(folder)
  config_lib.check(config)
  task = kept.task(folder, config)
  if task.kind != "conversations" and not task.image:
    task.text(dict.fromkeys(task.fields, "a"))
  rows = jsonl.read(folder)
  found = report.results(folder)
  if found is not None:
    report.summary(found, folder)
    report._markdown(found)
  return config, task.description(), rows, found


def _parameters(folder: pathlib.Path) -> None:
  kept.save_parameters(
    folder, {"head": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}
  )


def _read_parameters(folder: pathlib.Path) -> Any:
  return jax.tree.map(np.shape, kept.load_parameters(folder))


# Data.

_ROWS = [
  {"text": f"a film, {'good' if i % 2 else 'bad'} {i}", "label": i % 2}
  for i in range(24)
]


def _csv(folder: pathlib.Path) -> None:
  lines = [f'"{row["text"]}",{row["label"]}' for row in _ROWS]
  (folder / "rows.csv").write_text("\n".join(["text,label", *lines, ""]))


def _tsv(folder: pathlib.Path) -> None:
  lines = [f"{row['text']}\t{row['label']}" for row in _ROWS]
  (folder / "rows.tsv").write_text("\n".join(["text\tlabel", *lines, ""]))


def _jsonl(folder: pathlib.Path) -> None:
  text = "".join(json.dumps(row) + "\n" for row in _ROWS)
  (folder / "rows.jsonl").write_text(text)


def _parquet(folder: pathlib.Path) -> None:
  import pyarrow as pa
  from pyarrow import parquet

  info = {
    "features": {"label": {"_type": "ClassLabel", "names": ["no", "yes"]}}
  }
  table = pa.Table.from_pylist(_ROWS).replace_schema_metadata(
    {"huggingface": json.dumps({"info": info})}
  )
  parquet.write_table(table, folder / "rows.parquet", compression="snappy")


def _saved(folder: pathlib.Path) -> None:
  """As `save_to_disk` of Hugging Face's datasets writes it."""
  import pyarrow as pa

  table = pa.Table.from_pylist(_ROWS)
  for split in ("train", "test"):
    (folder / split).mkdir()
    with pa.ipc.new_stream(
      folder / split / "data.arrow", table.schema
    ) as stream:
      stream.write_table(table)
    state = {"_data_files": [{"filename": "data.arrow"}], "_split": split}
    _write_json(folder / split / "state.json", state)
    features = {"label": {"_type": "ClassLabel", "names": ["no", "yes"]}}
    _write_json(folder / split / "dataset_info.json", {"features": features})
  _write_json(folder / "dataset_dict.json", {"splits": ["train", "test"]})


def _images(folder: pathlib.Path) -> None:
  for i in range(12):
    place = folder / ("cat", "dog")[i % 2]
    place.mkdir(exist_ok=True)
    pixels = np.full((5, 6, 3), 20 * i, np.uint8)
    kind = ("png", "jpg", "gif", "bmp", "tiff", "webp")[i // 2]
    PIL.Image.fromarray(pixels).save(place / f"{i}.{kind}")


def _conversations(folder: pathlib.Path) -> None:
  rows = [
    {
      "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": f"ask {i}"},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
      ]
    }
    for i in range(6)
  ]
  rows += [{"question": f"q {i}", "answer": "b #### 4"} for i in range(6)]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "rows.jsonl").write_text(text)


def _read_rows(name: str, kind: str, folder: pathlib.Path) -> Any:
  task, notes = columns.fit(
    tasks.get(kind),
    data_options.DataOptions(task=kind, path=str(folder / name)),
  )
  assert task.source is not None
  rows = [*task.source.read("train", None)]
  if task.image:
    images.decoded(task, rows, 4)
    return task.labels, notes, len(rows)
  return task.labels, notes, [task.text(row) for row in rows]


def _read_conversations(folder: pathlib.Path) -> Any:
  return instructions.splits(str(folder / "rows.jsonl"))


# Studies, and configurations in YAML.

_TOML = """\
[study]
name = "tiny"
folder = "{folder}"
seeds = [0, 1]
reference = "LoRA"

[defaults]
train_rows = 32
epochs = 2
learning_rate = 0.01
compilation_cache = false

[[task]]
name = "snippets"

[[method]]
name = "LoRA"
method = "lora"

[[method]]
name = "Bi-LoRA"
method = "bilora"
seeds = 2
tune = {{ rho = [0.05, 0.5] }}

[tuning]
trials = 2
seeds = [100]

[sharpness]
rows = 16
radii = [0.1, 1]
average = 0
low_rank = 0

[[recovery]]
reference = "LoRA"
target = "Bi-LoRA"

[landscape]
methods = ["LoRA"]
points = 3
rows = 16
"""


def _study(folder: pathlib.Path) -> None:
  (folder / "study.toml").write_text(_TOML.format(folder=folder / "out"))


def _rows(folder: pathlib.Path) -> None:
  """The rows of a study that is finished."""
  _study(folder)
  (folder / "out").mkdir()
  study = spec.read(folder / "study.toml")
  done: dict[str, Any] = {}
  for cell in study.cells:
    for run in plan.trials(study, cell):
      done[run.key] = _row(run)
    point = plan.winner(study, cell, done)
    assert point is not None
    for run in plan.finals(study, cell, point):
      done[run.key] = _row(run)
      if run.landscape is not None:
        losses = [1.0, 0.5, None]
        row = landscape_rows.row(
          run, run.key, {"line": losses, "plane": [losses] * 3}
        )
        record.append(folder / "out" / landscape_rows.FILE, row)
  for row in done.values():
    record.append(folder / "out" / record.RUNS, row)


def _row(run: plan.Run) -> dict[str, Any]:
  row = {
    "key": run.key,
    "label": run.cell.label,
    "task": run.cell.task,
    "stage": run.stage,
    "seed": run.config.optimisation.seed,
    "point": dict(run.point),
    "metric": "accuracy",
    "score": 0.5,
    "failed": None,
    "config": config_lib.flat(run.config),
    "sharpness_options": None,
    "step_seconds": 0.2,
    "gradients_per_step": 1.0,
    "validation": {"best": {"accuracy": 0.5, "loss": 0.5}},
    "curves": {"loss": [[1, 0.7], [2, 0.5]], "turnover": [[1, 0.1], [2, None]]},
    "machine": "one",
    "jax": "0",
    "date": "2026-01-01",
  }
  if run.stage == "final":
    assert run.sharpness is not None
    rise = {"rise": [0.5 for _ in run.sharpness.radii]}
    row["sharpness_options"] = dataclasses.asdict(run.sharpness)
    row["test"] = {"accuracy": 0.5, "loss": 0.5}
    row["sharpness"] = {"loss": 0.3, "full": {"one_step": rise}}
  return row


def _read_study(folder: pathlib.Path) -> Any:
  return spec.read(folder / "study.toml")


def _read_report(folder: pathlib.Path) -> Any:
  """The tables of a study's report."""
  study = spec.read(folder / "study.toml")
  done = plan.finished(record.read(study.folder / record.RUNS))
  found = results.collect(study, done)
  lines = study_report._head(study, found)
  rows = record.read(study.folder / landscape_rows.FILE)
  landscapes = landscape_rows.collect(study, found, rows)
  for of_task in found.values():
    lines += study_report._task(study, of_task, {})
  return lines, landscapes


def _yaml(folder: pathlib.Path) -> None:
  (folder / "run.yaml").write_text(
    "task: snippets\nmethod: bilora\nrho: 0.05\n"
    "adapter:\n  rank: 4\n  alpha: 8\n"
    "optimisation:\n  epochs: 2\n  seed: 1\ncompilation_cache: false\n"
    "targets: '.*'\nmesh: ''\n"
  )


def _read_yaml(folder: pathlib.Path) -> Any:
  config = command_line.from_file(folder / "run.yaml")
  config_lib.check(config)
  return config


_TOKENIZER = (*[mutate.in_json] * 3, mutate.flipped, mutate.cut)

FORMATS: dict[str, Format] = {
  "bert": Format(
    _bert,
    {
      "config.json": mutate.JSON,
      "tokenizer.json": _TOKENIZER,
      "model.safetensors": mutate.SAFETENSORS,
    },
    _read_model,
  ),
  "decoder": Format(
    _llama,
    {
      "config.json": mutate.JSON,
      "tokenizer.json": _TOKENIZER,
      "tokenizer_config.json": mutate.JSON,
      "generation_config.json": mutate.JSON,
      "model.safetensors.index.json": mutate.JSON,
      "model-00002-of-00002.safetensors": mutate.SAFETENSORS,
    },
    _read_model,
  ),
  "t5": Format(
    _t5,
    {
      "config.json": mutate.JSON,
      "tokenizer.json": _TOKENIZER,
      "model.safetensors": mutate.SAFETENSORS,
    },
    _read_model,
  ),
  "spiece": Format(_spiece, {"spiece.model": mutate.BYTES}, _read_model),
  "gguf": Format(_gguf, {"model.gguf": mutate.BYTES}, _read_model),
  "onnx": Format(_onnx, {"model.onnx": mutate.BYTES}, _read_model),
  "adapters": Format(
    _adapters,
    {
      "adapters.json": mutate.JSON,
      "adapters.safetensors": mutate.SAFETENSORS,
    },
    _read_adapters,
  ),
  "peft": Format(
    _peft,
    {
      "adapter_config.json": mutate.JSON,
      "adapter_model.safetensors": mutate.SAFETENSORS,
    },
    _read_peft,
  ),
  "run": Format(
    _run,
    {
      "config.json": mutate.JSON,
      "task.json": mutate.JSON,
      "adapters/adapters.json": mutate.JSON,
      "adapters/adapters.safetensors": mutate.SAFETENSORS,
    },
    _read_run,
  ),
  "texts of a run": Format(
    _run,
    {
      "config.json": mutate.JSON,
      "task.json": mutate.JSON,
      "results.json": mutate.JSON,
      "metrics.jsonl": mutate.JSONL,
    },
    _read_texts_of_run,
  ),
  "parameters": Format(
    _parameters, {kept.PARAMETERS: mutate.SAFETENSORS}, _read_parameters
  ),
  "csv": Format(
    _csv,
    {"rows.csv": mutate.TEXT},
    functools.partial(_read_rows, "rows.csv", "classification"),
  ),
  "tsv": Format(
    _tsv,
    {"rows.tsv": mutate.TEXT},
    functools.partial(_read_rows, "rows.tsv", "regression"),
  ),
  "jsonl": Format(
    _jsonl,
    {"rows.jsonl": mutate.JSONL},
    functools.partial(_read_rows, "rows.jsonl", "regression"),
  ),
  "classes in jsonl": Format(
    _jsonl,
    {"rows.jsonl": mutate.JSONL},
    functools.partial(_read_rows, "rows.jsonl", "classification"),
  ),
  "parquet": Format(
    _parquet,
    {"rows.parquet": mutate.BYTES},
    functools.partial(_read_rows, "rows.parquet", "classification"),
  ),
  "saved": Format(
    _saved,
    {
      "dataset_dict.json": mutate.JSON,
      "train/state.json": mutate.JSON,
      "train/dataset_info.json": mutate.JSON,
      "train/data.arrow": mutate.BYTES,
    },
    functools.partial(_read_rows, "", "classification"),
  ),
  "images": Format(
    _images,
    {
      f"{('cat', 'dog')[i % 2]}/{i}.{kind}": mutate.BYTES
      for i, kind in enumerate(
        x for x in ("png", "jpg", "gif", "bmp", "tiff", "webp") for _ in "ab"
      )
    },
    functools.partial(_read_rows, "", "classification"),
  ),
  "conversations": Format(
    _conversations, {"rows.jsonl": mutate.JSONL}, _read_conversations
  ),
  "study": Format(_study, {"study.toml": mutate.TEXT}, _read_study),
  "rows of a study": Format(
    _rows,
    {
      "out/runs.jsonl": mutate.JSONL,
      "out/landscapes.jsonl": mutate.JSONL,
      "study.toml": mutate.TEXT,
    },
    _read_report,
  ),
  "yaml": Format(_yaml, {"run.yaml": mutate.TEXT}, _read_yaml),
}
