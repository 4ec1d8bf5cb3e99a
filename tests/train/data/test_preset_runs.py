"""The paper's presets on tiny stand-ins, and files in their true format."""

import functools
import json
import shutil

import glue_files
import jax
import numpy as np
import outcomes
import pytest
from safetensors import numpy as st_numpy
import super_glue_files

from train import __main__ as program
from train import presets
from train.run import assemble, step
from train.run import config as config_lib

pytestmark = pytest.mark.slow

_SMALL = {
  "batch_size": 8,
  "epochs": 1,
  "learning_rate": 0.01,
  "compilation_cache": False,
}


def _prepared(config):
  """A prepared run, what makes its state, and its step."""
  config.folder().mkdir(exist_ok=True)
  ready = assemble.prepare(config)
  init = functools.partial(step.init, ready.method, jax.random.key(0))
  return (
    ready,
    init,
    step.make_train_step(
      ready.method,
      ready.data.objective,
      accumulate=config.optimisation.accumulate,
    ),
  )


def _steps(config, count=2):
  """The prepared run with its state after the first steps."""
  ready, init, train_step = _prepared(config)
  state = jax.jit(init)(ready.variables)
  before = jax.device_get(ready.method.evaluated(state.trained))
  losses = []
  for _, batch in zip(range(count), ready.data.train_batches()):
    state, found = train_step(ready.variables, state, batch)
    losses.append(float(found.loss))
    assert found.nonfinite == 0
  assert len(losses) == count
  assert np.isfinite(losses).all()
  # What is trained has moved, all of it that has a gradient in the first step.
  after = ready.method.evaluated(state.trained)
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after)
  ):
    assert np.abs(x - y).max() > 0, jax.tree_util.keystr(path)
  return ready, state


def test_cola_is_learned_and_scored_by_a_t5(put, tiny_t5, tmp_path, capsys):
  data_dir = put("glue/cola", glue_files.COLA)
  folder = tmp_path / "run"
  options = [
    *("--preset", "t5-base-glue-cola", "--model", str(tiny_t5)),
    *("--data-dir", str(data_dir), "--run-dir", str(folder)),
    *("--batch-size", "8", "--epochs", "2", "--learning-rate", "0.02"),
    *("--log-every", "1", "--scan-layers", "--no-compilation-cache"),
  ]
  assert outcomes.main(options) == 0
  losses = [row["loss"] for row in outcomes.rows(folder) if "loss" in row]
  assert len(losses) == 2 * (36 // 8)
  assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
  results = json.loads((folder / "results.json").read_text())
  assert results["metric"] == "matthews_correlation"
  assert results["test"]["rows"] == 2
  assert -1 <= results["test"]["matthews_correlation"] <= 1
  # With its adapters, it answers what it is asked.
  capsys.readouterr()
  more = ("--max-new-tokens", "3", "--prompt", "one", "and two")
  assert program.main(["generate", "--run", str(folder), *more]) == 0
  assert capsys.readouterr().out.count("> ") == 2


def test_a_t5_tells_three_classes_with_lora_sam(put, tiny_t5, tmp_path):
  config = config_lib.replace(
    presets.get("t5-base-super-glue-cb-lora-sam"),
    **_SMALL,
    model=str(tiny_t5),
    data_dir=str(put("super_glue/cb", _glue("super_glue/cb"))),
    run_dir=str(tmp_path / "run"),
  )
  ready, state = _steps(config)
  evaluated = ready.method.evaluated(state.trained)
  eval_step = step.make_eval_step(ready.method, ready.data.objective)
  found = ready.data.evaluate(
    lambda batch: eval_step(ready.variables, evaluated, batch), "test"
  )
  assert found.rows == 5
  assert set(found.metrics) == {"accuracy"}
  # Padding is no token of a source either: wider batches score alike.
  batch = next(iter(ready.data.reader.whole(ready.data.examples["test"], 5)))
  width = batch["tokens"].shape[1]
  wider = {
    **batch,
    "tokens": np.pad(batch["tokens"], ((0, 0), (0, 9)), constant_values=5),
    "mask": np.pad(batch["mask"], ((0, 0), (0, 9))),
  }
  narrow, wide = (
    eval_step(ready.variables, evaluated, x) for x in (batch, wider)
  )
  assert wider["tokens"].shape[1] == width + 9
  np.testing.assert_allclose(narrow.losses, wide.losses, rtol=1e-5)


def _changed(folder, copy, changes, biases=False):
  """A tiny decoder as of another family."""
  shutil.copytree(folder, copy)
  config = json.loads((copy / "config.json").read_text()) | changes
  (copy / "config.json").write_text(json.dumps(config))
  if biases:
    (file, *_) = sorted(copy.glob("*.safetensors"))
    index = copy / "model.safetensors.index.json"
    shards = json.loads(index.read_text())
    found = st_numpy.load_file(file)
    for i in range(config["num_hidden_layers"]):
      for name, width in (("q", 16), ("k", 8), ("v", 8)):
        key = f"model.layers.{i}.self_attn.{name}_proj.bias"
        found[key] = np.full(width, 0.1, np.float32)
        shards["weight_map"][key] = file.name
    st_numpy.save_file(found, file)
    index.write_text(json.dumps(shards))
  return copy


_LLAMA3 = {
  "rope_theta": 500000.0,
  "rope_scaling": {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
  },
}


def _instructions(data, path):
  """Rows in the form of the published ones."""
  rows = []
  for i in range(60):
    asked, answer = f"What is {i} and {i}?", str(2 * i)
    rows.append(
      {
        "metamathqa.jsonl": {"query": asked, "response": f"#### {answer}"},
        "code-feedback.jsonl": {"query": asked, "answer": answer},
        "wizardlm.jsonl": {"instruction": asked, "output": answer},
        "alpaca-cleaned.jsonl": {
          "instruction": "Add.",
          "input": f"{i} and {i}",
          "output": answer,
        },
      }[data]
    )
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def _glue(name):
  """A task's files."""
  if name in super_glue_files.ROWS:
    rows = super_glue_files.numbered(name, 45)
    return super_glue_files.files(name, rows[:40], rows[40:])
  return getattr(glue_files, name.removeprefix("glue/").upper())


# Of programs that are compiled: the others differ from it in numbers, biases or
# less, and are traced.
_COMPILED = "llama2-7b-metamathqa"


def pytest_generate_tests(metafunc):
  """All of the paper's presets if asked for, else one of each decoder."""
  if "preset" in metafunc.fixturenames:
    names = [name for name in presets.PRESETS if "snippets" not in name]
    if not metafunc.config.getoption("--every-preset"):
      names = [
        _COMPILED,
        "llama3.1-8b-alpaca-lora",
        "qwen2.5-14b-alpaca",
      ]
    metafunc.parametrize("preset", names)


def test_a_preset_takes_steps_on_rows_of_its_form(
  request, preset, put, tiny_t5, tiny_decoder, tmp_path
):
  config = presets.get(preset)
  small = {**_SMALL, "run_dir": str(tmp_path / "run")}
  if config.data.task == "instructions":
    changes, biases = {}, False
    if "llama3.1" in preset:
      changes = _LLAMA3
    if "qwen2.5" in preset:
      changes, biases = {"model_type": "qwen2"}, True
    model = _changed(tiny_decoder, tmp_path / "model", changes, biases)
    small |= {
      "model": str(model),
      "data": str(_instructions(config.data.path, tmp_path / "rows.jsonl")),
      "accumulate": 2,
      "max_length": 64,
      "train_rows": 48,
    }
  else:
    data_dir = put(config.data.task, _glue(config.data.task))
    small |= {"model": str(tiny_t5), "data_dir": str(data_dir)}
  config = config_lib.replace(config, **small)
  if preset == _COMPILED or request.config.getoption("--every-preset"):
    _steps(config)
    return
  ready, init, train_step = _prepared(config)
  state = jax.eval_shape(init, ready.variables)
  batch = next(ready.data.train_batches())
  after, found = jax.eval_shape(train_step, ready.variables, state, batch)
  assert found.loss.shape == ()
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
    lambda x: (x.shape, x.dtype), after
  )


def test_questions_are_asked_and_scored(tiny_decoder, tmp_path, capsys):
  path = tmp_path / "questions.jsonl"
  rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(3)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  model = ("--model", str(tiny_decoder), "--max-new-tokens", "2")
  options = (*model, "--questions", str(path), "--score", "gsm8k")
  assert program.main(["generate", *options, "--batch-size", "2"]) == 0
  out = capsys.readouterr().out
  assert [out.count(f"> {i}?\n") for i in range(3)] == [1, 1, 1]
  assert " of 3 right: " in out.splitlines()[-1]
  for wrong, part in (
    (("--score", "gsm8k", "--prompt", "a"), "needs --questions"),
    ((), "got neither"),
    (("--prompt", "a", "--questions", str(path)), "got both"),
    (("--questions", str(tmp_path / "no.jsonl")), "no.jsonl is not there"),
    (("--prompt", "a", "--batch-size", "0"), "--batch-size must be at least 1"),
  ):
    assert program.main(["generate", *model, *wrong]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert part in error
