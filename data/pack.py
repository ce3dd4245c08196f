"""Cuts films into clips and packs them as records to train on.

  python data/pack.py --films out/films --out out/records --clip_seconds 2

Every film under --films is searched for hard cuts, each shot is cut into clips of --clip_seconds (what is left at its
end is dropped), and each clip is encoded anew, so that it decodes alone. Whole films go to train or held_out by a hash
of their name, so a clip's neighbours never stand on both sides; of a single film the last clips are held out.

Beside a film NAME.mp4 may stand NAME.txt with its caption, NAME.json with "caption", "licence", "source", or "shots",
each with "start", "end" (frames) and "caption", and NAME.masks.npz with the tracked character, as toons.py writes them.

A film that cannot be read is skipped, counted and named. Each film is finished on its own in OUT/parts, so an
interrupted run goes on where it stopped; shards appear at the end, and index.json, without which no one reads them,
comes last.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import command
import cv2
import numpy as np
from absl import flags
from curation import motion
from scenedetect import ContentDetector, FrameTimecode
from tqdm import tqdm

from anisora_jax import errors
from anisora_jax.loaders import records, video

SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv"}
SEARCH_WIDTH = 160   # cuts are searched on small pictures
SHORTEST_SHOT = .6   # seconds; shorter flashes belong to their neighbours


@dataclass(frozen=True)
class Settings:
  """What decides the contents of the records, besides the films."""
  clip_seconds: float
  height: int       # 0 keeps the film's
  width: int        # 0 keeps the film's shape
  held_out: float   # share of the films
  threshold: float  # of ContentDetector: mean change of hue, saturation and value that is a cut
  crf: int
  source: str
  licence: str
  shard_megabytes: float

  def __post_init__(self):
    ranges = {"clip_seconds": (.05, 3600), "height": (0, 8192), "width": (0, 8192), "held_out": (0, .9),
              "threshold": (1, 255), "crf": (0, 51), "shard_megabytes": (.001, 10**5)}
    for name, (low, high) in ranges.items():
      if not low <= getattr(self, name) <= high:
        raise errors.BadInput(f"--{name} is {getattr(self, name)}: allowed are {low} to {high}.")
    for name in ("height", "width"):
      if getattr(self, name) % 2:
        raise errors.BadInput(f"--{name} is {getattr(self, name)}: H.264 in yuv420p needs an even number of pixels.")


def find_films(folder: Path) -> list[str]:
  """Names of all film files under a folder, sorted, hidden ones left out. Raises BadInput if there are none."""
  if not folder.is_dir():
    raise errors.BadInput(f"--films {folder} is not a folder: give one of films ({' '.join(sorted(SUFFIXES))}).")
  names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                 if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not path.is_dir())
  if not names:
    raise errors.BadInput(f"no films in {folder}: looked for {' '.join(sorted(SUFFIXES))} among "
                          f"{sum(1 for _ in folder.rglob('*'))} entries; python data/toons.py draws some.")
  return names


def find_cuts(path: Path, threshold: float) -> tuple[list[int], int]:
  """The first frame of every shot but the first, and the number of frames. Raises video.Unreadable."""
  about = video.facts(path)
  scale = min(1, SEARCH_WIDTH / about.width)
  size = video.Size(max(1, round(about.height * scale)), max(1, round(about.width * scale)))
  detector = ContentDetector(threshold=threshold, min_scene_len=max(1, round(SHORTEST_SHOT * about.fps)))
  cuts, number = [], -1
  for number, picture in enumerate(video.pictures(path, threads=0)):
    blue_first = np.ascontiguousarray(video.rgb(picture, size)[..., ::-1])
    cuts += [cut.frame_num for cut in detector.process_frame(FrameTimecode(number, about.fps), blue_first)]
  return cuts, number + 1


def clip_spans(cuts: list[int], frames: int, length: int) -> list[range]:
  """Cuts every shot into ranges of `length` frames from its start on."""
  bounds = [0, *cuts, frames]
  return [range(first, first + length) for start, end in itertools.pairwise(bounds)
          for first in range(start, end - length + 1, length)]


def read_spans(path: Path, spans: list[range], size: video.Size) -> Iterator[tuple[range, np.ndarray]]:
  """Yields the frames of each span, in one pass over the film. Spans rise and do not overlap."""
  left, held = iter(spans), []
  span = next(left, None)
  for number, picture in enumerate(video.pictures(path, threads=0)):
    if span is None:
      return
    if number in span:
      held.append(video.rgb(picture, size))
    if len(held) == len(span):
      yield span, np.stack(held)
      span, held = next(left, None), []


def clip_size(about: video.Facts, settings: Settings) -> video.Size:
  """The clips' size: as asked, or of the film's shape; even, as yuv420p needs."""
  height, width = settings.height, settings.width
  if not height:
    height = round(about.height * width / about.width) if width else about.height
  width = width or round(about.width * height / about.height)
  return video.Size(max(2, height // 2 * 2), max(2, width // 2 * 2))


@dataclass(frozen=True)
class Beside:
  """What the files beside a film say of it. shots: (start, end, caption); character: bool [frames, H, W]."""
  caption: str
  source: str
  licence: str
  shots: list[tuple[int, int, str]]
  character: np.ndarray | None

  def caption_of(self, span: range) -> str:
    """The caption of the shot that holds the middle of a clip, or the film's."""
    middle = (span.start + span.stop) // 2
    return next((caption for start, end, caption in self.shots if start <= middle < end), self.caption)


def read_words(path: Path) -> tuple[str, dict, list[tuple[int, int, str]]]:
  """What NAME.txt and NAME.json beside a film say: its caption, all of the json, and its shots (start, end, caption).

  Raises video.Unreadable where one of them is damaged.
  """
  try:
    text, facts = path.with_suffix(".txt"), path.with_suffix(".json")
    caption = text.read_text("utf-8").strip() if text.is_file() else ""
    known = json.loads(facts.read_text("utf-8")) if facts.is_file() else {}
    shots = [(int(shot["start"]), int(shot["end"]), str(shot["caption"])) for shot in known.get("shots", [])]
    return str(known.get("caption", caption)), known, shots
  except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
    raise video.Unreadable(f"a file beside it is damaged ({error})") from error


def read_beside(path: Path, settings: Settings, about: video.Facts) -> Beside:
  """Reads NAME.txt, NAME.json and NAME.masks.npz. Raises video.Unreadable where one of them is damaged."""
  caption, known, shots = read_words(path)
  try:
    character = None
    if (masks := path.with_suffix(".masks.npz")).is_file():
      with np.load(masks, allow_pickle=False) as file:
        shape = tuple(int(n) for n in file["shape"])
        character = np.unpackbits(file["visible"], count=int(np.prod(shape))).reshape(shape).astype(bool)
      if shape[1:] != (about.height, about.width):
        raise ValueError(f"masks are {shape[1]}x{shape[2]}, the film is {about.height}x{about.width}")
  except (ValueError, KeyError, TypeError, AttributeError, OSError, zipfile.BadZipFile) as error:
    raise video.Unreadable(f"a file beside it is damaged ({error})") from error
  return Beside(caption, str(known.get("source", settings.source)), str(known.get("licence", settings.licence)), shots,
                character)


def cut_film(folder: Path, film: str, settings: Settings) -> list[records.Clip]:
  """All clips of one film. Raises video.Unreadable."""
  path = folder / film
  about = video.facts(path)
  beside = read_beside(path, settings, about)
  cuts, frames = find_cuts(path, settings.threshold)
  if beside.character is not None and len(beside.character) != frames:
    raise video.Unreadable(f"there are masks of {len(beside.character)} frames beside a film of {frames}")
  size = clip_size(about, settings)
  spans = clip_spans(cuts, frames, max(1, round(settings.clip_seconds * about.fps)))
  clips = []
  for span, clip in read_spans(path, spans, size):
    character = None if beside.character is None else records.pack_mask(
      np.stack([video.fit_mask(mask, size) for mask in beside.character[span.start:span.stop]]))
    clips.append(records.Clip(
      id=f"{film}/{span.start:06}", film=film, source=beside.source, licence=beside.licence,
      caption=beside.caption_of(span), fps=about.fps, frames=len(span), height=size.height, width=size.width,
      motion=motion.motion(clip), mp4=video.encode(clip, about.fps, settings.crf), character=character))
  return clips


def part_of(out: Path, film: str) -> Path:
  """Where the clips of one film wait until the shards are written."""
  return out / "parts" / f"{hashlib.sha256(film.encode()).hexdigest()[:20]}.arrayrecord"


def shown(film: str) -> str:
  """The name of a film for people, where it is not UTF-8 with escapes."""
  return os.fsencode(film).decode("utf-8", "backslashreplace")


def state_of(folder: Path, film: str) -> list[int]:
  """Size and time of change: a film that changed is cut again."""
  status = (folder / film).stat()
  return [status.st_size, status.st_mtime_ns]


def pack_film(folder: Path, out: Path, film: str, settings: Settings) -> str | None:
  """Cuts one film into its part file unless that is done. Returns why the film cannot be read, or None."""
  cv2.setNumThreads(1)  # films are cut side by side already
  if shown(film) != film:
    return "its name is not UTF-8, as records are: rename it"
  part = part_of(out, film)
  note = part.with_suffix(".json")
  try:
    done = {"film": film, "state": state_of(folder, film), "settings": asdict(settings)}
    if note.exists() and all(json.loads(note.read_text()).get(key) == value for key, value in done.items()):
      return None
    clips = cut_film(folder, film, settings)
  except (video.Unreadable, OSError) as error:
    return f"{error}"
  records.write_shard(part, [records.to_bytes(clip) for clip in clips])
  done |= {"clips": len(clips), "licences": Counter(clip.licence for clip in clips),
           "sizes": Counter(f"{clip.height}x{clip.width} at {clip.fps:g} fps" for clip in clips)}
  unfinished = note.with_suffix(".partial")
  unfinished.write_text(json.dumps(done))
  unfinished.replace(note)
  return None


def split_films(clips: dict[str, int], share: float) -> dict[str, list[tuple[str, range]]]:
  """Gives every film, or the first and last clips of an only film, to a split. clips: film -> number of its clips.

  The hash of a film's name decides, so a film keeps its split when others come or go. Where the hash would hold none
  out, the film next in line is held out.
  """
  whole = {film: range(count) for film, count in clips.items() if count}
  if share == 0 or not whole:
    return {"train": list(whole.items()), "held_out": []}
  if len(whole) == 1:
    (film, numbers), = whole.items()
    kept = len(numbers) - max(1, round(share * len(numbers))) if len(numbers) > 1 else 1
    return {"train": [(film, numbers[:kept])], "held_out": [(film, numbers[kept:])] if numbers[kept:] else []}
  place = {film: int(hashlib.sha256(film.encode()).hexdigest(), 16) / 2**256 for film in whole}
  out = {film for film in whole if place[film] < share} or {min(place, key=place.get)}
  if len(out) == len(whole):
    out.remove(max(out, key=place.get))
  return {"train": [item for item in whole.items() if item[0] not in out],
          "held_out": [item for item in whole.items() if item[0] in out]}


def cut_films(folder: Path, out: Path, films: list[str], settings: Settings, workers: int) -> dict[str, str]:
  """Cuts all films side by side. Returns the reasons of those that cannot be read."""
  (out / "parts").mkdir(parents=True, exist_ok=True)
  reasons, work = {}, partial(pack_film, folder, out, settings=settings)
  for film, reason in tqdm(side_by_side(work, films, workers), total=len(films), desc="films cut", unit="film"):
    if reason:
      reasons[film] = reason
      tqdm.write(f"skipped {shown(film)}: {reason}")
  return dict(sorted(reasons.items()))


def side_by_side(work: Callable[[str], str | None], films: list[str], workers: int) -> Iterator[tuple[str, str | None]]:
  """(film, what `work` says of it) as each is done, in processes; one that kills its process is found and named."""
  left = []
  with ProcessPoolExecutor(min(workers, len(films)), multiprocessing.get_context("spawn")) as pool:
    tasks = {pool.submit(work, film): film for film in films}
    try:
      for task in as_completed(tasks):
        try:
          yield tasks[task], task.result()
        except BrokenProcessPool:  # of all that were under work and still to come
          left.append(tasks[task])
    except BaseException:  # a full disk, Ctrl-C: it is told now, and not after all other films
      pool.shutdown(cancel_futures=True)
      raise
  for film in left:
    yield from side_by_side(work, [film], 1) if len(films) > 1 else [(film, "it ends the process that reads it")]


def write_records(out: Path, notes: dict[str, dict], settings: Settings) -> dict:
  """Copies the parts into the shards of each split; returns the index without its heading."""
  for leftover in [*out.glob("*.arrayrecord"), *out.glob(".*.partial")]:
    leftover.unlink()  # of a run that was interrupted here: without an index no one reads them
  index = {"splits": {}}
  split = split_films({film: note["clips"] for film, note in notes.items()}, settings.held_out)
  for name, items in split.items():
    shards = records.write_shards(out, name, [(part_of(out, film), numbers) for film, numbers in items],
                                  int(settings.shard_megabytes * 2**20)) if items else []
    count = sum(shard["records"] for shard in shards)
    index["splits"][name] = {"records": count, "films": len(items), "shards": shards}
  for key in ("licences", "sizes"):
    index[key] = dict(sum((Counter(note[key]) for note in notes.values()), Counter()))
  return index


def main(settings: Settings, films_folder: Path, out: Path, workers: int) -> None:
  """Cuts, packs and says what came of it."""
  if workers < 1:
    raise errors.BadInput(f"--workers is {workers}: at least one process must do the work.")
  films = find_films(films_folder)
  sizes = [(film, (films_folder / film).stat().st_size) for film in films if (films_folder / film).exists()]
  heading = {"clip_seconds": settings.clip_seconds, "settings": asdict(settings),
             "films": hashlib.sha256(json.dumps(sizes).encode()).hexdigest()}
  if (out / records.INDEX).exists():
    before = json.loads((out / records.INDEX).read_text())
    differing = [key for key in heading if before.get(key) != heading[key]]
    if differing:
      raise errors.BadInput(f"{out} holds records of other films or settings ({', '.join(differing)} differ): "
                            "take another --out, or delete it.")
    print(f"{out} is complete already")
    return
  reasons = cut_films(films_folder, out, films, settings, workers)
  notes = {film: json.loads(part_of(out, film).with_suffix(".json").read_text())
           for film in films if film not in reasons}
  if not any(note["clips"] for note in notes.values()):
    why = (f"the others have no shot of {settings.clip_seconds:g} s, take a smaller --clip_seconds" if notes else
           "; ".join(f"{shown(film)}: {reason}" for film, reason in list(reasons.items())[:3]))
    raise errors.BadInput(f"none of the {len(films)} films in {films_folder} gave a clip: {why}.")
  index = {**heading, **write_records(out, notes, settings), "skipped": reasons}
  unfinished = out / f".{records.INDEX}.partial"
  unfinished.write_text(json.dumps(index, indent=1))
  unfinished.replace(out / records.INDEX)
  shutil.rmtree(out / "parts")
  report(out, index, len(notes))


def report(out: Path, index: dict, films: int) -> None:
  """Prints what was packed, what was skipped, and how the only film was divided."""
  train, held_out = (index["splits"][name]["records"] for name in records.SPLITS)
  print(f"{out}: {train} train and {held_out} held-out clips of {index['clip_seconds']:g} s from {films} films, "
        f"{len(index['skipped'])} films skipped; sizes {index['sizes']}; licences {index['licences']}")
  if films == 1:
    print("There is one film only, so its last clips are held out; they look much like its first." if held_out else
          "There is one film of one clip only, so nothing is held out.")


def define_flags() -> None:
  flags.DEFINE_string("films", None, "Folder of films, searched to any depth.", required=True)
  flags.DEFINE_string("out", None, "Folder the records are written to.", required=True)
  flags.DEFINE_float("clip_seconds", 2, "Length of a clip in seconds. Training takes a piece of it at its own pace.")
  flags.DEFINE_integer("height", 0, "Rows of pixels of a clip; 0 keeps the film's.")
  flags.DEFINE_integer("width", 0, "Columns of pixels; 0 keeps the film's shape. With both given, films are cropped.")
  flags.DEFINE_float("held_out", .1, "Share of the films that is never trained on.")
  flags.DEFINE_float("threshold", 27, "How hard a change is a cut: mean change of hue, saturation and value, 0 to 255.")
  flags.DEFINE_integer("crf", 15, "Quality of the clips' H.264: 0 is lossless, 15 looks it, 23 is small.")
  flags.DEFINE_string("source", "", "Where the films come from, for those that do not say.")
  flags.DEFINE_string("licence", "unknown", "Licence of the films that do not say.")
  flags.DEFINE_float("shard_megabytes", 256, "Size of one record file.")
  flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes that cut films.")


if __name__ == "__main__":
  command.run(define_flags, lambda given: main(
    Settings(**{name: given[name].value for name in Settings.__dataclass_fields__}), Path(given.films), Path(given.out),
    given.workers))
