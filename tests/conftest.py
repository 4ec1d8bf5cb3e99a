"""Eight virtual CPU devices, and compilations kept between runs."""

import pathlib

import jax
import pytest

_REPOSITORY = pathlib.Path(__file__).parent.parent

# Before anything touches a device: pmap, shard_map and meshes need several.
jax.config.update("jax_num_cpu_devices", 8)
# The suite is mostly compilation. `.cache` is ignored by git.
jax.config.update(
  "jax_compilation_cache_dir", str(_REPOSITORY / ".cache" / "jax")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Doctests are looked for in every file; this one needs PyTorch to be imported.
collect_ignore_glob = ["*/make_minilm_reference.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Files with slow tests first, so that no process is left with one alone."""
  slow = {item.path for item in items if item.get_closest_marker("slow")}
  items.sort(key=lambda item: item.path not in slow)
