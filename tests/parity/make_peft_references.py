"""Writes tests/train/models/data/peft_*: adapters by PEFT, and their logits.

Run it where `make test-parity` runs, from anywhere:

  .venv-parity/bin/python tests/parity/make_peft_references.py

Each case is a folder: `adapter`, as PEFT saves it, of factors that are all
random, and reference.npz: rows of tokens and their logits in float32, one row
at a time, so that no padding takes part. The BERT's base is in it too; that of
the Llama is the one that make_decoder_references.py makes. CI needs no PyTorch.
"""

import pathlib

import numpy as np
import peft
import torch
import transformers

OUT = pathlib.Path(__file__).parents[1] / "train" / "models" / "data"
LENGTHS = (9, 5, 12)


def randomised(
  model: torch.nn.Module, *parts: str, scale: float = 0.2
) -> torch.nn.Module:
  """Moves the parameters that have one of these in their names.

  What starts at zero or one would hide a mistake.
  """
  torch.manual_seed(1)
  with torch.no_grad():
    for name, value in model.named_parameters():
      if any(part in name for part in parts):
        value += scale * torch.randn_like(value)
  return model.eval()


def bert_config() -> transformers.BertConfig:
  return transformers.BertConfig(
    vocab_size=31,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=16,
    initializer_range=0.25,
    num_labels=3,
  )


def _bert(folder: pathlib.Path) -> torch.nn.Module:
  torch.manual_seed(0)
  base = transformers.BertForTokenClassification(bert_config())
  randomised(base, "bias", "Norm").save_pretrained(folder)
  lora = peft.LoraConfig(
    task_type="TOKEN_CLS",
    r=3,
    lora_alpha=7,
    target_modules=["query", "value", "dense"],
    rank_pattern={"layer.1.attention.self.query": 2},
    alpha_pattern={"output.dense": 5},
  )
  return peft.get_peft_model(base, lora)


def _llama(folder: pathlib.Path) -> torch.nn.Module:
  base = transformers.AutoModelForCausalLM.from_pretrained(
    folder.with_name("llama_tied"), dtype=torch.float32
  )
  lora = peft.LoraConfig(
    task_type="CAUSAL_LM",
    r=2,
    lora_alpha=3,
    use_rslora=True,
    target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
  )
  return peft.get_peft_model(base, lora)


def main() -> None:
  rng = np.random.default_rng(0)
  for name, make in {"peft_bert": _bert, "peft_llama": _llama}.items():
    folder = OUT / name
    model = randomised(make(folder), "lora_", "modules_to_save")
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    arrays = {}
    for i, length in enumerate(LENGTHS):
      tokens = rng.integers(0, model.config.vocab_size, length)
      with torch.no_grad():
        logits = model(torch.tensor(tokens)[None]).logits[0]
      arrays[f"tokens_{i}"] = tokens.astype(np.int32)
      arrays[f"logits_{i}"] = logits.numpy()
    np.savez_compressed(folder / "reference.npz", **arrays)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    spread = np.std(np.concatenate([arrays[f"logits_{i}"] for i in range(3)]))
    print(f"{name}: {size} bytes, logits of standard deviation {spread:.2f}")


if __name__ == "__main__":
  main()
