"""A user's own program asked about a shot: JSON on its standard input, JSON from its standard output.

The command is a list of words, never a shell's line. It is held to a time and to a length of its answer, and what it
started is ended with it.
"""

import contextlib
import json
import os
import resource
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from anisora_jax.errors import BadInput

ANSWER = 2**20   # bytes of an answer, at most
_TAIL = 2000     # bytes of what it says on standard error that are looked at


class Failed(BadInput):
  """A provider that did not answer as it must. One line with its name."""


def ask(name: str, command: Sequence[str], request: dict[str, Any], seconds: float) -> dict[str, Any]:
  """Runs a provider's command once and returns the JSON object it prints. Raises Failed."""
  deadline = time.monotonic() + seconds
  with tempfile.TemporaryFile() as question:
    question.write(json.dumps(request).encode())
    question.seek(0)
    try:
      process = subprocess.Popen(list(command), stdin=question, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 start_new_session=True)
    except (OSError, ValueError) as error:
      raise Failed(f"provider {name!r} does not start ({error}): its command is {list(command)!r}, give the words of "
                   "one that runs from here.") from error
    with process:
      _unbounded(process.pid)
      try:
        answer, said = _listen(name, process, deadline, seconds)
        status = process.wait(max(.01, deadline - time.monotonic()))
      except subprocess.TimeoutExpired:
        raise _late(name, seconds) from None
      finally:
        try:
          os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
          process.kill()
  if status:
    raise Failed(f"provider {name!r} ended with status {status}: {_last_line(said)}")
  return _parsed(name, answer)


def _unbounded(process: int) -> None:
  """Lifts the limit of memory that we have set ourselves, as far as we may: CUDA reserves more addresses than films."""
  hard = resource.getrlimit(resource.RLIMIT_AS)[1]
  with contextlib.suppress(ProcessLookupError):
    resource.prlimit(process, resource.RLIMIT_AS, (hard, hard))


def _late(name: str, seconds: float) -> Failed:
  return Failed(f"provider {name!r} did not answer within {seconds:g} s: give it more seconds or fewer frames.")


def _listen(name: str, process: subprocess.Popen, deadline: float, seconds: float) -> tuple[bytes, bytes]:
  """All of standard output, and the end of standard error."""
  heard = {process.stdout: b"", process.stderr: b""}
  with selectors.DefaultSelector() as selector:
    for pipe in heard:
      selector.register(pipe, selectors.EVENT_READ)
    while selector.get_map():
      ready = selector.select(max(0, deadline - time.monotonic()))
      if not ready:
        raise _late(name, seconds)
      for key, _ in ready:
        piece = os.read(key.fd, 2**16)
        if not piece:
          selector.unregister(key.fileobj)
        heard[key.fileobj] += piece
      heard[process.stderr] = heard[process.stderr][-_TAIL:]
      if len(heard[process.stdout]) > ANSWER:
        raise Failed(f"provider {name!r} answers with more than {ANSWER} bytes: print one JSON object.")
  return heard[process.stdout], heard[process.stderr]


def _last_line(said: bytes) -> str:
  lines = said.decode("utf-8", "replace").split("\n")
  last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
  return "".join(c if c.isprintable() else " " for c in last).strip()[-200:]


def _refuse(word: str) -> float:
  raise ValueError(f"{word} is no number")


def _parsed(name: str, answer: bytes) -> dict[str, Any]:
  try:
    reply = json.loads(answer.decode("utf-8"), parse_constant=_refuse)
  except (ValueError, RecursionError) as error:
    raise Failed(f"provider {name!r} does not answer in JSON ({_last_line(str(error).encode())}): print one object on "
                 "standard output, and all else on standard error.") from error
  if not isinstance(reply, dict):
    raise Failed(f"provider {name!r} answers with a {type(reply).__name__}: print a JSON object.")
  return reply
