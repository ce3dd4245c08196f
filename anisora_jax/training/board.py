"""Scalars for TensorBoard.

TensorBoard's own records and checksums, but not its writer: that is a thread behind a queue, and once a full disk has
killed the thread, the trainer waits at the queue for ever and takes no signal.
"""

import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from anisora_jax.training.append import Append


def framed(data: bytes) -> bytes:
  """One record of an event file: length, its checksum, data, its checksum; little-endian.

  From: TensorFlow, record_writer.h, the TFRecord format.
  """
  length = struct.pack("<Q", len(data))
  return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


class Board:
  """An event file in a folder. start: the step that the run resumes after; what was shown beyond it is taken back."""

  def __init__(self, folder: Path, start: int, say: Callable[[str], None]):
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
    self._append = Append(folder / name, say)
    self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
    self._write(Event(wall_time=time.time(), step=start + 1, session_log=SessionLog(status=SessionLog.START)))

  def __call__(self, step: int, scalars: Mapping[str, float]) -> None:
    values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

  def _write(self, event: Event) -> None:
    self._append(framed(event.SerializeToString()))

  def close(self) -> None:
    self._append.close()
