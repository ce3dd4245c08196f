"""The size and SHA-256 of every file of a checkpoint, written with it and compared before it is read.

Orbax restores a flipped bit without a word, so bytes are trusted only if they are the bytes that were written.
The manifest itself needs no checksum: each of its fields is compared with something else.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "manifest.json"
FORMAT = 1
READERS = 8  # hashlib lets go of the interpreter lock, so threads read and hash side by side


def sha256(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: Path, step: int) -> None:
  """Writes the manifest of a complete checkpoint folder. Reads every file once; raises OSError."""
  paths = sorted(path for path in folder.rglob("*") if path.is_file())
  with ThreadPoolExecutor(READERS) as pool:
    digests = list(pool.map(sha256, paths))
  files = {path.relative_to(folder).as_posix(): [path.stat().st_size, digest]
           for path, digest in zip(paths, digests, strict=True)}
  with (folder / NAME).open("w") as file:
    json.dump({"format": FORMAT, "step": step, "files": files}, file, separators=(",", ":"))
    file.flush()
    os.fsync(file.fileno())


def fault(folder: Path, step: int) -> str | None:
  """What is wrong with a checkpoint folder, naming the file, or None if every byte is as written."""
  try:
    manifest = json.loads((folder / NAME).read_bytes())
    kind, written, files = manifest["format"], manifest["step"], manifest["files"]
    expected = {name: (int(size), str(digest)) for name, (size, digest) in files.items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    return f"{NAME} cannot be read ({type(error).__name__})"
  if kind != FORMAT:
    return f"{NAME} is of format {kind!r} and this program reads format {FORMAT}"
  if written != step:
    return f"{NAME} is that of step {written!r}"
  for name, (size, _) in expected.items():
    path = folder / name
    if not path.is_file():
      return f"{name} is missing"
    if path.stat().st_size != size:
      return f"{name} has {path.stat().st_size} bytes and was written with {size}"
  with ThreadPoolExecutor(READERS) as pool:
    digests = pool.map(sha256, [folder / name for name in expected])
    changed = [name for (name, (_, digest)), found in zip(expected.items(), digests, strict=True) if found != digest]
  return f"{changed[0]} is not as it was written (SHA-256 differs)" if changed else None
