"""Decoders of Llama's kind."""
