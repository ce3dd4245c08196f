"""A process that does what may crash, hang or eat all memory, so that only the film at hand is lost.

FFmpeg reads whatever people put on disks; a damaged film can end the process or never come back. Beam's own
`with_exception_handling(use_subprocess=True)` forks a process that has threads, and leaves alive what that one started
(a captioner); this child is started anew, and dies with its parent and with all it started, whichever way that goes.
"""

import contextlib
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import cv2

from anisora_jax.errors import BadInput

DATA = Path(__file__).resolve().parents[1]


class Lost(Exception):
  """The work was given up. args: reason ("timed_out", "crashed" or "failed"), and a detail for people."""


@dataclass(frozen=True)
class Limits:
  """seconds: for one call. gigabytes: of address space; 0 sets no limit."""
  seconds: float
  gigabytes: float

  def __post_init__(self):
    if not (self.seconds > 0 and self.gigabytes >= 0):
      raise BadInput(f"config.limits is {self.seconds:g} seconds and {self.gigabytes:g} gigabytes: seconds must be "
                     "above 0, gigabytes 0 (none) or more.")


class Child:
  """Calls functions of modules in another process; starts it when needed, and anew after it was lost."""

  def __init__(self, limits: Limits):
    self._limits, self._process, self._line = limits, None, None

  def call(self, function: Callable, *arguments: Any) -> Any:
    """What `function(*arguments)` returns. Raises Lost, and BadInput where the function does."""
    try:
      if self._process is None:
        self._start()
      self._line.send((function, arguments))
      if not self._line.poll(self._limits.seconds):
        self.close()
        raise Lost("timed_out", f"took longer than {self._limits.seconds:g} s")
      outcome, value = self._line.recv()
    except (EOFError, ConnectionError) as error:
      status = self._process.wait()
      self.close()
      word = signal.Signals(-status).name if status < 0 else f"status {status}"
      raise Lost("crashed", f"the process that read it ended with {word}") from error
    if outcome == "mistake":
      raise BadInput(value)
    if outcome == "failed":
      raise Lost("failed", value)
    return value

  def _start(self) -> None:
    self._line, theirs = Pipe()
    path = os.pathsep.join([str(DATA), str(DATA.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    self._process = subprocess.Popen(
      [sys.executable, "-m", "curation.child", str(theirs.fileno()), str(self._limits.seconds),
       str(self._limits.gigabytes)], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2,
      start_new_session=True, env={**os.environ, "PYTHONPATH": path})
    theirs.close()
    self._line.recv()  # it is up: a film's seconds begin after

  def close(self) -> None:
    """Ends the process and whatever it started."""
    if self._process is not None:
      _kill([*below(self._process.pid), self._process.pid])
      self._process.wait()
      self._line.close()
      self._process = None


def below(process: int) -> list[int]:
  """All processes that one started, and those that they started, whatever group they are in."""
  found = []
  for threads in Path(f"/proc/{process}/task").glob("*/children"):
    with contextlib.suppress(OSError):  # a thread that ended meanwhile
      for child in map(int, threads.read_text().split()):
        found += [*below(child), child]
  return found


def _kill(processes: list[int]) -> None:
  for process in processes:
    with contextlib.suppress(ProcessLookupError):
      os.kill(process, signal.SIGKILL)


def serve(line: Connection, seconds: float, gigabytes: float) -> None:
  """The child's side: does one call after another until the parent is gone."""
  if gigabytes:
    bounds, hard = int(gigabytes * 2**30), resource.getrlimit(resource.RLIMIT_AS)[1]
    # Only the soft one: a program of the user's is let go of it, see provider.py.
    resource.setrlimit(resource.RLIMIT_AS, (bounds if hard == resource.RLIM_INFINITY else min(bounds, hard), hard))
  cv2.setNumThreads(1)  # films are read side by side already
  calls: queue.SimpleQueue = queue.SimpleQueue()

  def listen() -> None:
    try:
      while True:
        calls.put(line.recv())
    except (EOFError, OSError):
      _kill([*below(os.getpid()), os.getpid()])

  threading.Thread(target=listen, daemon=True).start()
  line.send("ready")
  while True:
    function, arguments = calls.get()
    # The kernel's own clock, should the parent die while C code keeps the thread above from running.
    signal.alarm(int(seconds) + 30)
    answer = _answer(function, arguments)
    signal.alarm(0)
    line.send(answer)


def _answer(function: Callable, arguments: tuple) -> tuple[str, Any]:
  try:
    return "done", function(*arguments)
  except BadInput as mistake:
    return "mistake", str(mistake)
  except Exception as error:  # one film must not end the run, whatever it does to us; its reason is in the funnel
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    return "failed", f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {text}"


if __name__ == "__main__":
  serve(Connection(int(sys.argv[1])), float(sys.argv[2]), float(sys.argv[3]))
