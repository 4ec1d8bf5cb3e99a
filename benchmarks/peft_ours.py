"""Runs LoRA steps of `python -m train` on request, for `against_peft.py`."""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import variants, worker, workloads
from bilora_jax import count_parameters
from train.models.decoder import config as decoder_config
from train.models.decoder import model as decoder
from train.models.decoder import weights as decoder_weights
from train.models.io import tensors
from train.run import step


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder", type=pathlib.Path, help="of the model")
  parser.add_argument("batch", type=pathlib.Path, help="an .npz file")
  options = parser.parse_args()
  worker.serve(lambda: _start(options))


def _start(options: argparse.Namespace):
  with np.load(options.batch, allow_pickle=False) as file:
    batch = dict(file)
  config = json.loads((options.folder / "config.json").read_text())
  if config["model_type"] == "bert":
    workload = workloads.build("minilm", *batch["tokens"].shape)
    variables = workload.variables()
    variables["params"]["head"]["kernel"] = jnp.asarray(batch.pop("head"))
  else:
    workload = _decoder(config, options.folder, batch)
    variables = workload.variables()
  method = variants.method(variants.BASE, workload)
  state = step.init(method, jax.random.key(0), variables)
  train_step = step.make_train_step(method, workload.objective)
  batch = jax.device_put(batch)

  def run() -> float:
    nonlocal state
    state, metrics = train_step(variables, state, batch)
    return float(jax.block_until_ready((state, metrics))[1].loss)

  return run, {
    "trained_parameters": sum(count_parameters(state.trained).values()),
    "device": jax.devices()[0].device_kind,
  }


def _decoder(config, folder: pathlib.Path, batch) -> workloads.Workload:
  sizes = decoder_config.DecoderConfig.from_hf(config)
  # No rematerialisation and no scan over layers, like the model in PEFT.
  model = decoder.Decoder(sizes, jnp.bfloat16, jnp.bfloat16)
  params = decoder_weights.params(
    sizes, tensors.open_safetensors(folder), dtype=jnp.bfloat16
  )
  return workloads.of_decoder(
    model, lambda: {"params": params}, *batch["tokens"].shape
  )


if __name__ == "__main__":
  main()
