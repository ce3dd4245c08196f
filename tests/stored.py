"""Folders of latents without an encoder: every number of a clip says which clip it is of, and which frame."""

from pathlib import Path

import numpy as np

from anisora_jax.loaders import latents, records
from anisora_jax.loaders.latents import LatentClip, Shapes, View

CELLS, CHANNELS, TEXT, IMAGE = (4, 6), 3, (5, 8), (2, 8)


def frames_of(size: str, stride: int) -> int:
  return 1 + (int(size.split("x")[0]) - 1) // stride


def clip_of(number: int, pixel_frames: int, f: int, mask: np.ndarray | None = None) -> LatentClip:
  """Latents [f, h, w, c] are the clip's number + the frame's / 100, text and image tokens the clip's number."""
  x = np.broadcast_to((number + np.arange(f) / 100)[:, None, None, None], (f, *CELLS, CHANNELS))
  if mask is None:
    mask = np.broadcast_to(np.arange(pixel_frames)[:, None, None] == 0, (pixel_frames, *CELLS))
  view = View(records.pack_mask(mask), latents.half(x + 1000), latents.half(np.full(IMAGE, number)))
  words = np.full((1 + number % TEXT[0], TEXT[1]), number)
  return LatentClip(f"clip {number}", "film", "here", "CC0-1.0", f"caption {number}", latents.half(x),
                    latents.half(words), (view,))


def write(folder: Path, counts: dict[str, dict[str, int]], stride: int = 4, first: int = 1) -> str:
  """counts: split -> size as "9x32x48" -> how many clips; numbered from `first` on, over all."""
  folder.mkdir(parents=True)
  sizes = {}
  for split in records.SPLITS:
    for size, count in counts.get(split, {}).items():
      pixel_frames, f = int(size.split("x")[0]), frames_of(size, stride)
      shape = Shapes((pixel_frames, *CELLS), (f, *CELLS, CHANNELS), TEXT, IMAGE)
      about = sizes.setdefault(size, {"shapes": vars(shape), "splits": {name: [] for name in records.SPLITS}})
      clips = [latents.to_bytes(clip_of(first + k, pixel_frames, f)) for k in range(count)]
      first += count
      if clips:
        about["splits"][split] = [records.write_shard(folder / f"{size}-{split}-00000.arrayrecord", clips)]
  latents.write_index(folder, {}, np.zeros((1, TEXT[1])), sizes)
  return str(folder)
