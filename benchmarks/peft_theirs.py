"""Runs LoRA steps of PyTorch and PEFT on request, for `against_peft.py`.

This module imports only `worker` from this repository.
"""

import argparse
import contextlib
import json
import pathlib

import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

from benchmarks import worker


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder", type=pathlib.Path, help="of the model")
  parser.add_argument("batch", type=pathlib.Path, help="an .npz file")
  parser.add_argument("--threads", type=int, required=True)
  parser.add_argument("--compile", action="store_true")
  options = parser.parse_args()
  worker.serve(lambda: _start(options))


def _start(options: argparse.Namespace):
  torch.manual_seed(0)
  torch.set_num_threads(options.threads)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  with np.load(options.batch, allow_pickle=False) as file:
    batch = {name: torch.from_numpy(file[name]).to(device) for name in file}
  config = json.loads((options.folder / "config.json").read_text())
  make = _classifier if config["model_type"] == "bert" else _language_model
  model, loss_fn, precision = make(options.folder, batch, device)
  model.train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0, fused=True)
  called = torch.compile(model) if options.compile else model

  def step() -> float:
    optimizer.zero_grad()
    with precision:
      loss = loss_fn(called)
    loss.backward()
    optimizer.step()
    return loss.item()

  return step, {
    "trained_parameters": sum(p.numel() for p in trained),
    "versions": {
      "torch": torch.__version__,
      "peft": peft.__version__,
      "transformers": transformers.__version__,
    },
    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
  }


class _Classifier(torch.nn.Module):
  """An encoder with a linear head on the mean of its hidden states."""

  def __init__(self, encoder, head):
    super().__init__()
    self.encoder = encoder
    self.head = head

  def forward(self, inputs):
    states = self.encoder(**inputs).last_hidden_state
    mask = inputs["attention_mask"]
    return self.head((states * mask[..., None]).sum(1) / mask.sum(1)[:, None])


def _classifier(folder, batch, device):
  encoder = transformers.BertModel.from_pretrained(
    folder,
    add_pooling_layer=False,
    dtype=torch.float32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
  )
  head = torch.nn.Linear(*batch["head"].shape)
  with torch.no_grad():
    head.weight.copy_(batch["head"].T)
    head.bias.zero_()
  model = _Classifier(_adapted(encoder), head).to(device)
  labels = batch["labels"].long()
  inputs = {
    "input_ids": batch["tokens"].long(),
    "attention_mask": batch["mask"],
    "token_type_ids": batch["token_types"].long(),
  }

  def loss_fn(called):
    return torch.nn.functional.cross_entropy(called(inputs), labels)

  return model, loss_fn, contextlib.nullcontext()


def _language_model(folder, batch, device):
  """Makes a decoder with random weights, and saves them in the folder."""
  config = transformers.AutoConfig.from_pretrained(folder)
  with torch.device(device):
    model = transformers.AutoModelForCausalLM.from_config(
      config, dtype=torch.bfloat16
    )
  model.save_pretrained(folder)
  tokens, targets = batch["tokens"].long(), batch["targets"].long()

  def loss_fn(called):
    logits = called(input_ids=tokens, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
      logits.float().flatten(0, 1), targets.flatten()
    )

  # The adapters are float32, as in bfloat16 training with the Trainer.
  return _adapted(model), loss_fn, torch.autocast(device, torch.bfloat16)


def _adapted(model):
  return peft.get_peft_model(
    model,
    peft.LoraConfig(
      r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear"
    ),
  )


if __name__ == "__main__":
  main()
