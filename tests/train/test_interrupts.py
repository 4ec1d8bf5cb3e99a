"""Ctrl-C ends the program with a line and a code, whoever would swallow it."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time

import pytest

from train import interrupts


@pytest.fixture(autouse=True)
def heard():
  """A shell has its background jobs ignore it, and so what they start."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def _interrupt():
  os.kill(os.getpid(), signal.SIGINT)
  time.sleep(1)


class _Destroyed:
  def __del__(self):
    _interrupt()


def _as_it_is():
  _interrupt()


def _as_an_error():
  try:
    _interrupt()
  except BaseException:
    raise ImportError("half of a module") from None


def _swallowed():
  with contextlib.suppress(BaseException):
    _interrupt()


def _in_a_destructor():
  _Destroyed()
  gc.collect()
  time.sleep(60)


@pytest.mark.parametrize(
  "work", [_as_it_is, _as_an_error, _swallowed, _in_a_destructor]
)
def test_a_ctrl_c_is_one_line_and_130(capsys, work):
  before = signal.getsignal(signal.SIGINT), sys.unraisablehook
  with pytest.raises(SystemExit) as end, interrupts.interruptible():
    work()
  assert end.value.code == 130
  assert capsys.readouterr().err == "interrupted.\n"
  assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before


def test_what_else_is_raised_is_left_as_it_is():
  with pytest.raises(KeyError), interrupts.interruptible():
    raise KeyError


_STUBBORN = """
import time
from train import interrupts
with interrupts.interruptible():
  while True:
    try:
      print("in", flush=True)
      time.sleep(60)
    except BaseException:
      print("swallowed", flush=True)
"""


def test_a_second_ctrl_c_ends_the_program_at_once():
  process = subprocess.Popen(
    [sys.executable, "-c", _STUBBORN],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  for line in ("in", "swallowed"):
    assert process.stdout.readline() == f"{line}\n"
    process.send_signal(signal.SIGINT)
  assert process.communicate(timeout=60)[1] == "interrupted.\n"
  assert process.returncode == 130
