"""Files that grow by whole records while a run goes on: a full disk costs records, never the run."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

from anisora_jax.errors import BadInput


class Append:
  """`append(data)` adds bytes at the end of a file in one write, or leaves the file as it was and says so once.

  A kill tears the last record at most. Raises BadInput if the file cannot be opened.
  """

  def __init__(self, path: Path, say: Callable[[str], None]):
    self._path, self._say, self._failing = path, say, False
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      self._file = path.open("ab", buffering=0)
    except OSError as error:
      raise BadInput(f"{path} cannot be written: {error.strerror}: free it, or take another folder.") from None

  def __call__(self, data: bytes) -> None:
    end = self._file.tell()
    try:
      if self._file.write(data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      self._failing = False
    except OSError as error:
      self._file.truncate(end)
      self._file.seek(end)
      if not self._failing:
        self._say(f"{self._path} cannot be written: {error.strerror}; what is reported until it can is not kept.")
      self._failing = True

  def close(self) -> None:
    self._file.close()
