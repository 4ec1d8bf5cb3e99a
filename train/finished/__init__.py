"""Commands for finished runs: predict, evaluate, generate and export."""
