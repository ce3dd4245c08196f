"""Frames -> mp4 and gif, each written whole or not at all."""

import io
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from anisora_jax.errors import BadInput
from anisora_jax.loaders import video

Film = UInt8[np.ndarray, "F H W 3"]  # 0 .. 255, red first


def land(path: str | Path, data: bytes) -> None:
  """Writes a file under another name and moves it into place, so that no reader ever sees half of it.

  Makes the folder. Raises BadInput where the folder or the disk refuses.
  """
  path = Path(path)
  aside = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside.write_bytes(data)
    os.replace(aside, path)
  except OSError as error:
    if path.parent.is_dir():
      aside.unlink(missing_ok=True)
    raise BadInput(f"cannot write {path}: {error.strerror}; give a folder with space that you may write to.") from error


def _enlarged(film: Film, times: int) -> UInt8[np.ndarray, "F y x 3"]:
  return film.repeat(times, 1).repeat(times, 2)


def write_mp4(path: str | Path, film: Film, fps: float, times: int = 1) -> None:
  """H.264, yuv420p: plays everywhere. Halved colour needs even sides, so an odd film gains a copy of its last row or
  column. fps: frames a second, kept as a fraction with a denominator up to 1001 (24000/1001 stays exact). times: each
  pixel becomes a square of so many a side, which spares a tiny film the smear of halved colour.
  """
  film = _enlarged(film, times)
  even = np.pad(film, ((0, 0), (0, film.shape[1] % 2), (0, film.shape[2] % 2), (0, 0)), mode="edge")
  land(path, video.encode(even, fps))


def write_gif(path: str | Path, film: Film, fps: float, times: int = 1) -> None:
  """An endless gif. One palette of 256 colours for all frames and no dithering, so that still areas stay still.

  A gif counts hundredths of a second: delays are rounded so that their sum is right. Players slow down what is faster
  than 50 frames a second, so of a faster film every n-th frame is taken. A frame equal to the one before lengthens it.
  times: as in write_mp4.
  """
  nth = max(1, int(np.ceil(fps / 50 - 1e-9)))
  film, fps = _enlarged(film[::nth], times), fps / nth
  palette = _palette(film)
  pages = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in film]
  ends = np.round(100 * np.arange(len(film) + 1) / fps).astype(int)
  delays = [int(10 * delay) for delay in np.diff(ends)]
  out = io.BytesIO()
  pages[0].save(out, "GIF", save_all=True, append_images=pages[1:], duration=delays, loop=0, optimize=False)
  land(path, out.getvalue())


def _palette(film: Film) -> Image.Image:
  """256 colours for the whole film, from at most about a million of its pixels."""
  nth = max(1, int(np.ceil(film.size / 3 / 1e6)))
  pixels = film.reshape(-1, 3)[::nth]
  return Image.fromarray(pixels[None]).quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
