"""Decoders like Llama."""
