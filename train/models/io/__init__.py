"""Files of pretrained models: weights, tokenizers, templates."""
