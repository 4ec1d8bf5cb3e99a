"""Eight virtual CPU devices, and compilations that are quick, and kept."""

import gc
import os
import pathlib

import jax
import jaxlib
import pytest

_REPOSITORY = pathlib.Path(__file__).parent.parent

# The collector looked through what is imported again and again, for 6 to 8% of
# the time. Most of what a test leaves is freed without it.
gc.set_threshold(100_000)

# Before anything touches a device: pmap, shard_map and meshes need several.
jax.config.update("jax_num_cpu_devices", 8)
# The suite is mostly compilation, of programs that run for moments: LLVM need
# not do its best, and what is compiled is kept (`.cache` is ignored by git), of
# however short a compilation: what computes one sum takes 20 ms, and other
# processes compute it too.
# XLA's own passes over the program stay as they are. Its older emitters of
# fusions, in one module, compile a step in a third of the time of the others.
# XLA ends the process at a flag that it does not know, and jaxlib 0.11 has the
# new emitters alone.
_flags = ["--xla_cpu_parallel_codegen_split_count=1"]
if jaxlib.version.__version_info__ < (0, 11):
  _flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(
  (os.environ.get("XLA_FLAGS", ""), *_flags)
).strip()
for _name, _value in {
  "jax_disable_most_optimizations": True,
  "jax_compilation_cache_dir": str(_REPOSITORY / ".cache" / "jax"),
  "jax_persistent_cache_min_compile_time_secs": 0.0,
  "jax_persistent_cache_min_entry_size_bytes": -1,
}.items():
  jax.config.update(_name, _value)
  # Of the processes that tests start, and of notebooks.
  os.environ[_name.upper()] = str(_value)

# Doctests are looked for in every file. One needs PyTorch to be imported; those
# of one name, as these, cannot all be.
collect_ignore_glob = ["*/make_minilm_reference.py", "*conftest.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption(
    "--every-preset",
    action="store_true",
    help="run each of the paper's presets, and not one of each model",
  )
  parser.addoption(
    "--long",
    type=int,
    nargs="?",
    const=10**9,
    default=0,
    help="tests/faults: try every moment, or so many, and not a few",
  )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Files with slow tests first, so that no process is left with one alone."""
  slow = {item.path for item in items if item.get_closest_marker("slow")}
  items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
  """What is imported by now stays."""
  gc.freeze()
