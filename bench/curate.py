"""What curation costs: frames a second of each stage against bare decoding, memory against length, Beam against a loop.

  python bench/curate.py --height 480 --seconds 60

Films are drawn: patches that slide, under the grain of film, with a cut every five seconds; or --film is one. Bare
decoding is PyAV alone, every picture decoded by one thread and none converted. Each stage runs in this process on one
core; time is its processor time. Memory is the peak of a process that takes a film through all stages, a short film and
one ten times as long. Beam is held against `plain`, a loop over the same films that does the same work in one child
process.
"""

import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import cv2
import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from curation import clips, cut, duplicates, film, frames, measure, pipeline, probe, select, settings, sources
from curation.child import Child
from curation.items import Candidate
from curation.store import Store

from anisora_jax import errors
from anisora_jax.loaders import video
from configs import curation as defaults

FPS, SHOT = 24, 5


def drawn(seconds: float, height: int, seed: int = 0) -> Iterator[np.ndarray]:
  """Frames of patches that slide to the left under grain, with a cut every SHOT seconds."""
  width = height * 16 // 9 // 2 * 2
  rng, cell = np.random.default_rng(seed), height // 8
  grain = rng.integers(0, 8, (height, 2 * width, 1), np.uint8)
  for number in range(round(seconds * FPS)):
    if number % (SHOT * FPS) == 0:
      patches = rng.integers(0, 232, (9, 40, 3)).astype(np.uint8)
      wide = np.kron(patches, np.ones((cell, cell, 1), np.uint8))
    at = number % (SHOT * FPS) * height // 240
    shift = number * 7919 % width
    yield wide[:height, at:at + width] + grain[:, shift:shift + width]


def write(path: Path, seconds: float, height: int, seed: int = 0) -> None:
  size = video.Size(height, height * 16 // 9 // 2 * 2)
  path.write_bytes(video.encode_each(drawn(seconds, height, seed), size, FPS, 20))


def bare(path: Path) -> None:
  """Decodes a film by PyAV alone."""
  with av.open(str(path)) as container:
    container.streams.video[0].codec_context.thread_count = 1
    for _ in container.decode(video=0):
      pass


def timed(work: Callable):
  """(processor seconds, what the work returns)."""
  start = time.process_time()
  out = work()
  return time.process_time() - start, out


def stages(path: Path, made: film.Settings) -> list[tuple[str, float]]:
  """(name, processor seconds) of decoding and of each stage of one film."""
  rows = [("bare decoding", timed(lambda: bare(path))[0])]

  def row(name: str, work: Callable):
    seconds, out = timed(work)
    rows.append((name, seconds))
    return out

  about = row("probe", lambda: probe.probe(path, path.name, made.probe))
  row("frames at 480", lambda: [None for _ in frames.paced(about, height=min(480, about.height))])
  shots, _, _ = row("cut", lambda: cut.cut(about, made.cut))
  found = row("measure", lambda: [measure.measure(about, shot, made.measure) for shot in shots])
  row("prints", lambda: [duplicates.prints(about, shot) for shot in shots])
  chosen = [Candidate(shot, about.fps, measures, ()) for shot, measures in zip(shots, found, strict=True)]
  row("encode", lambda: [clips.encode(about, candidate.shot, made.clip) for candidate in chosen])
  return rows


def plain(found: list, made: settings.Settings, store: Store) -> None:
  """What the first Beam pipeline does, as a loop: analyse, share keys, compare."""
  child, crowds = Child(made.film.limits), {}
  for source in found:
    for key, place in select.bands(child, source, made, store):
      crowds.setdefault(key, []).append(place)
  together = {}
  for crowd in crowds.items():
    for places, names in pipeline.neighbours(crowd):
      together.setdefault(places, set()).add(names)
  for group in together.items():
    list(select.compare(child, group, store))
  child.close()


def beam(found: list, made: settings.Settings, store: Store) -> None:
  works = [pipeline.Work(select.bands, (made, store), made.film.limits),
           pipeline.Work(select.compare, (store,), made.film.limits)]
  pipeline.pairs("analyse", found, *works, store.folder, pipeline.Runner(workers=1))


def overhead(folder: Path, made: settings.Settings, count: int) -> tuple[float, float]:
  """Seconds of the loop and of Beam over `count` short films."""
  (folder / "many").mkdir()
  for number in range(count):
    write(folder / "many" / f"{number}.mp4", 4, 96, number)
  found, times = sources.find(str(folder / "many"), folder / "out"), []
  for name, way in (("plain", plain), ("beam", beam)):
    start = time.perf_counter()
    way(found, made, Store(folder / name))
    times.append(time.perf_counter() - start)
  return times[0], times[1]


def _peak(path: str, folder: str, answer) -> None:
  source, = sources.find(path, Path(folder))
  film.analyse(source, settings.read(defaults.get_config()).film, Path(folder))
  answer.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak(path: Path, folder: Path) -> float:
  """Mebibytes at most of a new process that analyses a film."""
  ours, theirs = multiprocessing.Pipe()
  process = multiprocessing.get_context("spawn").Process(target=_peak, args=(str(path), str(folder), theirs))
  process.start()
  mebibytes = ours.recv()
  process.join()
  return mebibytes


def main() -> None:
  given, folder = flags.FLAGS, Path(tempfile.mkdtemp())
  cv2.setNumThreads(1)
  made = settings.read(defaults.get_config())
  try:
    path = Path(given.film or folder / "film.mp4")
    if not given.film:
      write(path, given.seconds, given.height)
    if given.warm:
      stages(path, made.film)
    rows, about = stages(path, made.film), probe.probe(path, path.name, made.film.probe)
    for name, seconds in rows:
      print(f"{name:14} {about.frames / seconds:7.0f} frames/s of one core, {rows[0][1] / seconds:6.2f} of decoding")
    both = sum(seconds for name, seconds in rows if name in ("cut", "measure"))
    whole = sum(seconds for name, seconds in rows if name not in ("bare decoding", "frames at 480"))
    print(f"cut + measure at {about.height} rows: {rows[0][1] / both:.2f} of bare decoding (goal >= 0.25); the whole "
          f"{rows[0][1] / whole:.2f}")
    write(folder / "short.mp4", given.long / 10, 96)
    write(folder / "long.mp4", given.long, 96)
    small, large = (peak(folder / name, folder / f"of {name}") for name in ("short.mp4", "long.mp4"))
    print(f"peak memory of a worker: {small:.0f} MiB for {given.long / 600:.0f} minutes, {large:.0f} MiB for "
          f"{given.long / 60:.0f} minutes of film")
    loop, engine = overhead(folder, made, given.films)
    print(f"{given.films} films of 4 s: a loop {loop:.1f} s, Beam {engine:.1f} s")
  finally:
    shutil.rmtree(folder)


if __name__ == "__main__":
  flags.DEFINE_string("film", "", "A film of your own instead of the drawn one.")
  flags.DEFINE_integer("height", 480, "Rows of the film whose frames are counted.")
  flags.DEFINE_integer("seconds", 60, "Its length.")
  flags.DEFINE_bool("warm", True, "Run once before timing, so that nothing is loaded while the clock runs.")
  flags.DEFINE_integer("long", 1800, "Seconds of the long film whose memory is looked at, held against a tenth of it.")
  flags.DEFINE_integer("films", 12, "Short films over which Beam is held against a loop.")
  app.run(lambda _: errors.run(main))
