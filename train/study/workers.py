"""Starts several processes for one study, and shares devices or cores."""

from collections.abc import Mapping, Sequence
import itertools
import os
import pathlib
import signal
import subprocess
import sys

from ..command import PACKAGE


def start(study: pathlib.Path, chosen: Sequence[str], count: int) -> int:
  """Starts workers and waits for them.

  If there are GPUs, each worker sees one of them. Workers that share a GPU
  allocate memory when they need it. Without GPUs, each worker is bound to its
  own share of the cores, and XLA starts one thread for each of these cores.

  Args:
    study: the TOML file of the study.
    chosen: the options that choose runs of the study.
    count: the number of workers.

  Returns:
    0 if all workers succeeded; 2 if a worker had a UsageError; else 1.
  """
  devices = gpus(os.environ)
  print(
    f"{count} workers, "
    + (f"on the GPUs {', '.join(devices)}" if devices else "on the CPU"),
    flush=True,
  )
  cores = None if devices else shares(_cores(), count)
  command = [sys.executable, "-m", PACKAGE, "study", str(study), *chosen]
  running: list[subprocess.Popen] = []
  try:
    for i in range(count):
      environment = dict(os.environ)
      if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[i % len(devices)]
        if count > len(devices):
          environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
      own = [*command, "--workers", str(count), "--worker", str(i)]
      if cores is not None:
        own += ["--cores", ",".join(map(str, cores[i]))]
      # In another process group, so that Ctrl-C reaches only this process,
      # which then ends the workers.
      running.append(subprocess.Popen(own, env=environment, process_group=0))
    codes = [process.wait() for process in running]
    return 2 if 2 in codes else int(any(codes))
  finally:
    for process in running:
      if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    for process in running:
      process.wait()


def bind(cores: Sequence[int]) -> None:
  """Binds this process to cores; call this before JAX starts threads."""
  if cores and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, cores)


def gpus(environment: Mapping[str, str]) -> list[str]:
  """Returns the GPUs that JAX may use, by names for `CUDA_VISIBLE_DEVICES`."""
  platforms = environment.get("JAX_PLATFORMS", "")
  if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
    return []
  visible = environment.get("CUDA_VISIBLE_DEVICES")
  if visible is not None:
    return [name for name in visible.split(",") if name]
  return [
    path.name.removeprefix("nvidia")
    for path in sorted(pathlib.Path("/dev").glob("nvidia[0-9]*"))
  ]


def shares(cores: Sequence[int], count: int) -> list[list[int]]:
  """Returns the cores of each worker; workers share cores if they are few."""
  if count > len(cores):
    return [[cores[i % len(cores)]] for i in range(count)]
  ends = [len(cores) * i // count for i in range(count + 1)]
  return [list(cores[a:b]) for a, b in itertools.pairwise(ends)]


def _cores() -> list[int]:
  if hasattr(os, "sched_getaffinity"):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))
