"""Small drawn films, packed as records, and what the tests of whole runs ask of the tiny recipe."""

from pathlib import Path

import pack
import toons

from configs import tiny

# A step that draws of two tasks compiles in two thirds of the time; one of them reads all that records hold.
FEW_TASKS = {name: 0.0 for name in tiny.get_config().tasks if name not in ("first", "character")}
FEW = tuple(f"--config.tasks.{name}=0" for name in FEW_TASKS)


def packed(folder: Path, count: int = 3, seconds: float = 6, clip_seconds: float = 1.0) -> Path:
  """Draws `count` films of 32 x 48 pixels into a folder and packs them; one or more are held out."""
  films, out = folder / "films", folder / "records"
  films.mkdir(parents=True)
  for seed in range(count):
    toons.write_film(films, f"film-{seed}", toons.draw_film(seed, seconds=seconds, height=32, width=48, fps=12))
  pack.main(pack.Settings(clip_seconds=clip_seconds, height=0, width=0, held_out=0.34, threshold=27.0, crf=15,
                          source="", licence="unknown", shard_megabytes=16.0), films, out, workers=1)
  return out
