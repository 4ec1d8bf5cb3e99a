"""Scripts that need PyTorch to be imported, where doctests are looked for."""

collect_ignore_glob = ["make_*.py"]
