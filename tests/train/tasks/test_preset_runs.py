"""The paper's presets on tiny stand-ins, and files in their true format."""

import dataclasses
import functools
import json
import shutil

import glue_files
import jax
import numpy as np
from outcomes import rows as metrics
import pytest
from safetensors import numpy as st_numpy

from train import __main__ as program
from train import assemble, presets, step

pytestmark = pytest.mark.slow

_SMALL = {
  "batch_size": 8,
  "epochs": 1,
  "learning_rate": 0.01,
  "compilation_cache": False,
}


def _steps(config, count=2):
  """The losses of the first steps, and the prepared run with its new state."""
  ready = assemble.prepare(config)
  init = jax.jit(functools.partial(step.init, ready.method))
  state = init(jax.random.key(0), ready.variables)
  train_step = step.make_train_step(
    ready.method, ready.data.objective, accumulate=config.accumulate
  )
  losses = []
  for _, batch in zip(range(count), ready.data.train_batches()):
    state, found = train_step(ready.variables, state, batch)
    losses.append(float(found.loss))
    assert found.nonfinite == 0
  assert len(losses) == count
  return losses, ready, state


def test_cola_is_learned_and_scored_by_a_t5(put, tiny_t5, tmp_path, capsys):
  data_dir = put("glue/cola", glue_files.COLA)
  folder = tmp_path / "run"
  options = [
    *("--preset", "t5-base-glue-cola", "--model", str(tiny_t5)),
    *("--data-dir", str(data_dir), "--run-dir", str(folder)),
    *("--batch-size", "8", "--epochs", "2", "--learning-rate", "0.02"),
    *("--log-every", "1", "--scan-layers", "--no-compilation-cache"),
  ]
  assert program.main(options) == 0
  losses = [row["loss"] for row in metrics(folder) if "loss" in row]
  assert len(losses) == 2 * (36 // 8)
  assert losses[-1] < losses[0]
  results = json.loads((folder / "results.json").read_text())
  assert results["metric"] == "matthews_correlation"
  assert results["test"]["rows"] == 2
  assert -1 <= results["test"]["matthews_correlation"] <= 1
  # With its adapters, it answers what it is asked.
  capsys.readouterr()
  more = ("--max-new-tokens", "3", "--prompt", "one", "and two")
  assert program.main(["generate", "--run", str(folder), *more]) == 0
  assert capsys.readouterr().out.count("> ") == 2


def _cb(put):
  """CommitmentBank, of three classes; its files' folder."""
  labels = ("entailment", "contradiction", "neutral")

  def lines(count):
    return "".join(
      json.dumps(
        {
          "premise": f"It was {i}. Was it?",
          "hypothesis": f"it was {i}",
          "label": labels[i % 3],
          "idx": i,
        }
      )
      + "\n"
      for i in range(count)
    )

  files = {"CB/train.jsonl": lines(40), "CB/val.jsonl": lines(5)}
  return put("super_glue/cb", {**files, "CB/test.jsonl": ""})


def test_a_t5_tells_three_classes_with_lora_sam(put, tiny_t5, tmp_path):
  config = dataclasses.replace(
    presets.get("t5-base-super-glue-cb-lora-sam"),
    **_SMALL,
    model=str(tiny_t5),
    data_dir=str(_cb(put)),
    run_dir=str(tmp_path / "run"),
  )
  losses, ready, state = _steps(config)
  assert losses[1] != losses[0]
  evaluated = ready.method.evaluated(state.trained)
  eval_step = step.make_eval_step(ready.method, ready.data.objective)
  found = ready.data.evaluate(
    lambda batch: eval_step(ready.variables, evaluated, batch), "test"
  )
  assert found.rows == 5
  assert set(found.metrics) == {"accuracy"}
  # Padding is no token of a source either: wider batches score alike.
  batch = next(iter(ready.data.whole(ready.data.examples["test"], 5)))
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


def _jsonl(folder, form):
  path = folder / "rows.jsonl"
  rows = [form(i, f"{i} and {i}") for i in range(60)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def _metamath(i, text):
  answer = f"{2 * i}\n#### {2 * i}"
  return {"query": f"What is {text}?", "response": answer, "type": "GSM_SV"}


def _alpaca(i, text):
  return {"instruction": "Add.", "input": text, "output": str(2 * i)}


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


@pytest.mark.parametrize(
  ("name", "form", "changes", "biases"),
  [
    ("llama2-7b-metamathqa", _metamath, {}, False),
    ("llama3.1-8b-alpaca-lora", _alpaca, _LLAMA3, False),
    ("qwen2.5-14b-alpaca", _alpaca, {"model_type": "qwen2"}, True),
  ],
)
def test_decoders_learn_from_instructions(
  name, form, changes, biases, tiny_decoder, tmp_path
):
  config = dataclasses.replace(
    presets.get(name),
    **_SMALL,
    accumulate=2 if form is _metamath else 1,
    max_length=64,
    train_rows=48,
    model=str(_changed(tiny_decoder, tmp_path / "model", changes, biases)),
    data=_jsonl(tmp_path, form),
    run_dir=str(tmp_path / "run"),
  )
  losses, _, _ = _steps(config)
  assert np.isfinite(losses).all()
  assert losses[1] != losses[0]


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
    (("--questions", str(tmp_path / "no.jsonl")), "cannot be read"),
    (("--prompt", "a", "--batch-size", "0"), "--batch-size is at least 1"),
  ):
    assert program.main(["generate", *model, *wrong]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert part in error
