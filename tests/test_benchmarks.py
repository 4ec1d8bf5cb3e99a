"""The benchmarks time what they say: the same losses, counts and ratios."""

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
  attention,
  clip_cost,
  launches,
  rounds,
  scaling,
  seeds,
  startup,
  step_time,
  variants,
  worker,
  workloads,
)
from train import config as config_lib
from train.data.objectives import CLASSIFICATION
from train.models.bert import model as bert
from train.models.decoder import config as decoder_config
from train.models.decoder import model as decoder

_ROOT = pathlib.Path(__file__).parents[1]
_DECODER = decoder.Decoder(
  decoder_config.DecoderConfig(
    vocab_size=13,
    hidden_size=8,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=12,
    max_positions=16,
  ),
  remat="full",
  scan=True,
)


_CLASSIFIER = bert.BertClassifier(
  bert.BertConfig(
    vocab_size=20000,
    hidden_size=4,
    num_layers=1,
    num_heads=1,
    intermediate_size=5,
  ),
  num_classes=2,
)


def _of_decoder() -> workloads.Workload:
  variables = jax.jit(_DECODER.init)(
    jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
  )
  return workloads.of_decoder(_DECODER, lambda: variables, 2, 6)


def _of_classifier() -> workloads.Workload:
  batch, model = workloads.labelled(4, 6), _CLASSIFIER
  variables = model.init(jax.random.key(0), *CLASSIFICATION.inputs(batch))
  return workloads.Workload(
    model, lambda: variables, CLASSIFICATION, batch, jnp.float32, 0
  )


@pytest.mark.parametrize("make", [_of_decoder, _of_classifier])
def test_separate_branches_give_the_loss_and_gradients_of_joined_ones(make):
  workload = make()
  joined, separate = (
    variants.method(name, workload)
    for name in ("Bi-LoRA 8+8", "Bi-LoRA 8+8, separate branches")
  )
  variables = workload.variables()
  adapters = joined.init(jax.random.key(0), variables)
  # Off zero, where the gradient of half the factors would be zero too.
  adapters = jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape),
    adapters,
  )

  def loss_fn(adapters, apply):
    logits = apply(variables, adapters, *workload.inputs)
    items = workload.objective.items(logits, workload.batch)
    return jnp.sum(items.losses * items.weights)

  @jax.jit
  def both(adapters):
    return tuple(
      jax.value_and_grad(loss_fn)(adapters, method.apply)
      for method in (joined, separate)
    )

  found, wanted = both(adapters)
  # Sums of float32 in another order.
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
    found,
    wanted,
  )
  # The auxiliary is in both losses: without it they would still agree.
  assert all(
    np.abs(x).max() > 1e-3 for x in jax.tree.leaves(wanted[1]["auxiliary"])
  )
  # And the forms differ: four thin products a layer, and two.
  products = [
    str(jax.make_jaxpr(lambda a, m=m: loss_fn(a, m.apply))(adapters)).count(
      "dot_general"
    )
    for m in (joined, separate)
  ]
  layers = len(joined.adapted.targets) if joined.adapted else 0
  assert products[1] - products[0] == 2 * layers


def test_the_operations_counted_are_those_that_xla_counts():
  class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(64, False)(nn.relu(nn.Dense(64, False)(x)))

  x = jnp.ones((128, 64))
  variables = jax.eval_shape(Stack().init, jax.random.key(0), x)
  workload = workloads.Workload(
    Stack(),
    lambda: variables,
    CLASSIFICATION,
    {"tokens": np.ones((2, 64), np.int32)},
    jnp.float32,
    sum(x.size for x in jax.tree.leaves(variables)),
  )

  def through(x, variables, cotangent):
    y, backward = jax.vjp(lambda x: Stack().apply(variables, x), x)
    return y, backward(cotangent)

  cost = jax.jit(through).lower(x, variables, x).compile().cost_analysis()
  # The activation function is in XLA's count, and not in ours.
  assert cost
  assert cost["flops"] == pytest.approx(workload.model_flops, rel=0.02)


@pytest.mark.parametrize(
  ("name", "published"),
  # Parameters without the embedding, or with a tied one, in billions.
  [("smollm2-135m", 0.1345), ("1b", 1.2358), ("llama3.1-8b", 7.505)],
)
def test_decoders_have_the_published_sizes(name, published):
  workload = workloads.build(name, batch_size=1, length=8)
  count = workload.model_flops / 4 / 8
  assert count / 1e9 == pytest.approx(published, rel=1e-3)


def test_a_slow_spell_does_not_change_a_ratio():
  # Times of a second machine load in the last three rounds of five.
  load = [1.0, 1.0, 5.0, 7.0, 9.0]
  row = rounds.compared({"a": load, "b": [1.5 * x for x in load]}, base="a")[1]
  assert row["median_ratio"] == pytest.approx(1.5)
  assert row["ratio_quartiles"] == pytest.approx([1.5, 1.5])
  assert row["median_seconds"] == 7.5


def test_every_round_runs_everything_once_in_changing_order():
  ran = []
  times = rounds.interleaved(
    {name: lambda name=name: ran.append(name) for name in "abc"}, 20, 2
  )
  assert {name: len(seconds) for name, seconds in times.items()} == {
    "a": 20,
    "b": 20,
    "c": 20,
  }
  orders = {"".join(ran[i : i + 3]) for i in range(0, len(ran), 3)}
  assert len(ran) == 66
  assert all(sorted(order) == list("abc") for order in orders)
  assert len(orders) > 3
  with pytest.raises(ValueError, match=r"at least 1 round.* got 0 and 2"):
    rounds.interleaved({}, 0, 2)


def test_a_scanned_stack_is_the_stack():
  layers, width = 3, 4
  x = jax.random.normal(jax.random.key(0), (5, width))
  kernels = jax.random.normal(jax.random.key(1), (layers, width, width))
  scanned = clip_cost.variant("Bi-LoRA 8+8", layers, width, True).adapters
  apart = {
    part: {
      str(i): jax.tree.map(lambda leaf, i=i: leaf[i], pair)
      for i in range(layers)
    }
    for part, pair in scanned.items()
  }
  expected = x
  for i in range(layers):
    kernel = kernels[i] + sum(pair.weight()[i] for pair in scanned.values())
    expected = jax.nn.relu(expected @ kernel)
  for adapters, kernel, flag in (
    (scanned, kernels, True),
    (apart, list(kernels), False),
  ):
    np.testing.assert_allclose(
      clip_cost.output(adapters, kernel, x, flag), expected, rtol=1e-4
    )


def test_step_time_reports_every_method_at_its_tokens(monkeypatch):
  monkeypatch.setattr(workloads, "build", lambda *args: _of_classifier())
  options = argparse.Namespace(
    workload="minilm",
    batch_size=None,
    length=None,
    remat="dots",
    unrolled=False,
    rounds=1,
    warmup=0,
    steps=1,
    all_methods=False,
    methods=None,
  )
  result = json.loads(json.dumps(step_time.measure(options, {})))
  assert [row["name"] for row in result["rows"]] == list(variants.NAMES)
  for row in result["rows"]:
    assert row["tokens_per_second"] == pytest.approx(24 / row["median_seconds"])
    assert row["planned_bytes"] > 0
  assert result["rows"][0]["median_ratio"] == 1


@pytest.mark.slow
def test_what_grows_is_measured_told_and_drawn(monkeypatch, tmp_path):
  start = scaling.Size(layers=2, width=32, length=4, rank=2, rows=1)
  monkeypatch.setattr(scaling, "_START", start)
  monkeypatch.setattr(scaling, "_GROWTH", {"adapted": (1, 2)})
  page, out = tmp_path / "page.md", tmp_path / "scaling.json"
  page.write_text(
    "Before.\n<!-- benchmarks.scaling --> old <!-- end -->\nAfter."
  )
  places = ("--page", str(page), "--out", str(out))
  monkeypatch.setattr(
    sys, "argv", ["scaling", "--rounds", "1", "--warmup", "0", *places]
  )
  scaling.main()
  rows = json.loads(out.read_text())["rows"]
  assert [(x["axis"], x["value"], x["name"]) for x in rows] == [
    ("adapted", layers, name)
    for layers in (1, 2)
    for name in ("LoRA", "Bi-LoRA")
  ]
  planned = [x["planned_bytes"] for x in rows]
  # Bi-LoRA has two adapters where LoRA has one.
  assert planned[0] < planned[1] and planned[0] < planned[2] < planned[3]
  text = page.read_text()
  assert text.startswith("Before.\n") and text.endswith("\nAfter.")
  assert "old" not in text and text.count("| adapted |") == 2
  assert "<svg" in page.with_suffix(".svg").read_text()


class _Parsed(Exception):
  """A command line was understood, and its work would begin."""


def test_the_gpu_script_asks_for_nothing_that_is_not_there(
  monkeypatch, tmp_path
):
  # It is run where a minute is dear, and no machine here can run it.
  commands, python = tmp_path / "commands", tmp_path / "python"
  python.write_text(f'#!/bin/sh\n(printf "%s\\0" "$@"; echo) >> {commands}\n')
  python.chmod(0o755)
  environment = {"PYTHON": python, "TORCH_PYTHON": "a-python", "CARD": "card"}
  subprocess.run(
    ["bash", _ROOT / "benchmarks/gpu.sh"],
    env=os.environ | environment | {"RESULTS": tmp_path},
    check=True,
  )
  parse = argparse.ArgumentParser.parse_args

  def parsed(*args, **kwargs):
    parse(*args, **kwargs)
    raise _Parsed

  monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
  modules = set()
  for line in commands.read_text().splitlines():
    flag, module, *options = line.rstrip("\0").split("\0")
    assert flag == "-m"
    modules.add(module)
    if module == "train":
      config_lib.parse(options)
    elif module == "pytest":
      assert (_ROOT / options[0]).is_dir()
    else:
      monkeypatch.setattr(sys, "argv", [module, *options])
      with pytest.raises(_Parsed):
        importlib.import_module(module).main()
  measured = {"attention", "step_time", "step_profile", "clip_cost"}
  assert modules == {"pytest", "train", "benchmarks.against_peft"} | {
    f"benchmarks.{name}" for name in measured
  }


def test_attention_is_compared_with_exact_products(monkeypatch, tmp_path):
  monkeypatch.setattr(attention, "_CASES", {"encoder": 1, "packed in 3": 3})
  path = tmp_path / "attention.json"
  options = ("--rounds", "1", "--shapes", "1,6,2,1,4", "--out", str(path))
  monkeypatch.setattr(sys, "argv", ["attention", *options])
  attention.main()
  rows = json.loads(path.read_text())["rows"]
  errors = [row for row in rows if "output" in row]
  times = [row for row in rows if "median_seconds" in row]
  for found in (errors, times):
    assert [(row["case"], row["kernel"]) for row in found] == [
      (case, kernel)
      for case in ("encoder", "packed in 3")
      for kernel in ("xla", "matmul")
    ]
  # float32, of which the products are exact but for their sums.
  for row in errors:
    assert max(row[name] for name in ("output", "dq", "dk", "dv")) < 1e-5


def test_seeds_at_once_take_the_steps_that_they_take_alone():
  ways = seeds.turns(_of_classifier(), seeds=3)
  losses = [[take() for _ in range(3)] for take in ways.values()]
  # Sums of float32 in another order, and Adam's first steps.
  np.testing.assert_allclose(*losses, rtol=1e-4)
  assert len(set(np.asarray(losses[0][-1]).tolist())) == 3


_SERVED = """
import os
from benchmarks import worker

def start():
  print("chatter of a library")
  losses = iter([0.5, 0.25])
  return lambda: next(losses), {"pid": os.getpid()}

worker.serve(start)
"""


def test_a_worker_steps_when_asked_and_says_when_it_is_gone(
  tmp_path, monkeypatch
):
  (tmp_path / "served.py").write_text(_SERVED)
  path = os.pathsep.join([str(tmp_path), str(_ROOT)])
  served = worker.Worker(sys.executable, "served", [], {"PYTHONPATH": path})
  assert served.about["pid"] != os.getpid()
  assert [served.step(), served.step()] == [0.5, 0.25]
  with pytest.raises(RuntimeError, match="served ended with status 1"):
    served.step()


def test_kernels_are_counted_where_they_run():
  text = """HloModule step

%body (x: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0)
  ROOT %y = f32[4] fusion(%x), kind=kLoop, calls=%inside
}

%other (x: f32[4]) -> f32[4] {
  ROOT %x = f32[4] parameter(0)
}

%inside (p: f32[4]) -> f32[4] {
  %p = f32[4] parameter(0)
  ROOT %n = f32[4] negate(%p)
}

ENTRY %main (p: f32[4], c: pred[]) -> f32[4] {
  %p = f32[4] parameter(0)
  %c = pred[] parameter(1)
  %a = f32[4] fusion(%p), kind=kLoop, calls=%inside
  %b = f32[4] custom-call(%a), custom_call_target="__cublas$gemm"
  ROOT %r = f32[4] conditional(%c, %a, %b), branch_computations={%body, %other}
}
"""
  assert launches.counted(text) == {"kernels": 3, "branches": 1}


def test_a_start_is_all_of_its_parts(tmp_path):
  sizes = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
  }
  (tmp_path / "config.json").write_text(json.dumps(sizes))
  options = ("--batch-size", "1", "--max-length", "4", "--method", "lora")
  found = startup.measure(
    ["compile", "--model", str(tmp_path), *options], tmp_path / "cache"
  )
  total = found.pop("total")
  assert list(found) == ["imports", "tracing", "lowering", "compiling", "rest"]
  assert all(seconds > 0 for seconds in found.values())
  assert sum(found.values()) == pytest.approx(total)


def test_a_start_that_fails_says_why(tmp_path):
  with pytest.raises(RuntimeError, match="no such-model"):
    startup.measure(["compile", "--model", "no such-model"], tmp_path)


def test_spans_within_spans_count_once():
  assert startup._length([(1.0, 4.0), (2.0, 3.0), (3.5, 5.0), (7.0, 8.0)]) == 5
