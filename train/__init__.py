"""A program that fine-tunes pretrained models with LoRA and Bi-LoRA."""
