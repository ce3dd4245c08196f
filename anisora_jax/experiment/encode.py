"""Clips become records of latents, text tokens and image tokens, so that training holds no encoder."""

import hashlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from anisora_jax.checkpoints import workdir
from anisora_jax.errors import BadInput, pick
from anisora_jax.experiment import encoders
from anisora_jax.experiment.parts import Parts
from anisora_jax.loaders import assign, latents, mixture, records, tfds, video
from anisora_jax.loaders import clips as clip_rows
from anisora_jax.loaders.assign import Deal
from anisora_jax.loaders.buckets import Bucket, parse
from anisora_jax.loaders.latents import LatentClip, Shapes, View
from anisora_jax.models.codec import latent_shape
from anisora_jax.models.wan import image
from anisora_jax.models.wan.sizes import SIZES
from anisora_jax.parallel import mesh as meshes
from anisora_jax.parallel import processes
from anisora_jax.tasks.masks import Mixture
from anisora_jax.training import views

SETTINGS = "settings.json"
PART = 32   # source records of one shard, which is what an interrupted run has to do again
TEXTS = 8   # captions that are encoded at once
NUMBERS = 2**31  # of windows, which devices know as int32; far apart, two may have the same
EDGE = 2**20  # bytes at both ends of a weight file by which it is known again


def fingerprint(path: Path) -> str:
  """Weights by their files' sizes and both ends, wherever they lie."""
  files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
  found = hashlib.sha256()
  for file in files:
    with file.open("rb") as stream:
      size = file.stat().st_size
      found.update(f"{file.name} {size} ".encode() + stream.read(EDGE))
      stream.seek(max(0, size - EDGE))
      found.update(stream.read(EDGE))
  return found.hexdigest()[:16]


def learned(config: ConfigDict) -> dict[str, Any]:
  """What a training config and the latents it reads must agree on: all that training would else have decided itself."""
  size = pick(SIZES, config.model.size, "model size")
  pixels = ("spatial", "temporal", "scale") if config.codec.name == "pixels" else ()
  return {"codec": config.codec.name, "codec settings": {name: config.codec[name] for name in pixels},
          "text": config.text.name, "text tokens": size.text_tokens,
          "image": config.image.name if size.image_width else "", "pictures": encoders.image_count(size),
          "fps": config.data.fps, "tasks": config.tasks.to_dict(), "drop_condition": config.loss.drop_condition}


def settings_of(config: ConfigDict) -> dict[str, Any]:
  """All that decides what is written: a folder of latents belongs to one such set."""
  def weights(field: str, wanted: bool) -> str:
    return fingerprint(encoders.place(config, field)) if wanted else ""

  def source(path: str) -> str:
    if path.startswith(tfds.PREFIX):
      return path
    return hashlib.sha256((Path(path).expanduser() / records.INDEX).read_bytes()).hexdigest()[:16]

  said, codec, sources = learned(config), config.codec.to_dict(), mixture.parse(config.data.records)
  about = {name: codec[name] for name in ("spatial", "temporal", "scale", "dtype", "tile", "overlap")}
  return {**said, "codec settings": about, "text dtype": config.text.dtype, "image dtype": config.image.dtype,
          "codec weights": weights("codec.weights", said["codec"] != "pixels"),
          "text weights": weights("text.weights", said["text"] != "words"),
          "tokenizer": weights("text.tokenizer", said["text"] != "words"),
          "image weights": weights("image.weights", bool(said["image"])),
          "buckets": [latents.size_name(bucket) for bucket in parse(config.data.buckets)],
          **({} if config.data.assign == "any" else {"assign": config.data.assign}),
          "views": config.data.views, "seed": config.seed, "part": PART,
          # Once they began at 0 in each source, so that a folder begun then would be of both.
          **({"numbers": "over all sources"} if len(sources) > 1 else {}),
          "records": [source(one.path) for one in sources]}


def empty_text(parts: Parts, config: ConfigDict) -> Float[np.ndarray, "s e"]:
  """Text tokens of the empty caption, of latents that must have been encoded as the config says. Raises BadInput."""
  several = len(parts.buckets) > 1 and config.data.assign == "fit"
  for source in mixture.parse(config.data.records):
    index, said = latents.read_index(Path(source.path).expanduser()), learned(config)
    before = {name: index["settings"].get(name) for name in said}
    codec = before["codec settings"] or {}  # of which dtype and tiles do not matter to who reads the latents
    before["codec settings"] = {name: codec.get(name) for name in said["codec settings"]}
    changed = workdir.differences(before, said)
    if changed:
      raise BadInput(f"{source.path} was encoded with other settings ("
                     f"{'; '.join(f'{name}: {change}' for name, change in changed.items())}): take these back, or "
                     "encode the clips again.")
    if several and index["settings"].get("assign", "any") != "fit":
      raise BadInput(f"{source.path} was encoded with data.assign=any, each clip in every size; with fit it would come "
                     "several times a pass: encode with fit too, or train with --config.data.assign=any.")
    found = latents.empty_text(index)
    if found.shape != (parts.size.text_tokens, parts.size.text_width):
      raise BadInput(f"{source.path} holds text tokens {found.shape} and the model reads {parts.size.text_tokens} of "
                     f"width {parts.size.text_width}: encode the clips for this model size.")
  return found


@dataclass(frozen=True)
class Window:
  """A piece of a clip, of a bucket's size. number: of this window among all of a split, for draws of its own."""

  clip: Any
  first: int
  number: int
  frames: np.ndarray
  character: Bool[np.ndarray, "F H W"]


@dataclass(frozen=True)
class Encoders:
  """look: (frames, character, numbers) -> Encoded, compiled; captions: -> text tokens. batch: windows at a time."""

  look: Callable
  captions: encoders.Captions
  batch: int


def load(config: ConfigDict, batch: int) -> Encoders:
  """Reads the encoders onto this host's devices, each host for itself: clips need no other host. Raises BadInput."""
  mesh = meshes.build({"fsdp": -1}, alone=True)
  if batch % mesh.size:
    raise BadInput(f"a batch of {batch} clips does not divide by the {mesh.size} devices of a host: take a multiple.")
  size = pick(SIZES, config.model.size, "model size")
  captions, codec = encoders.captions(config, mesh, size), encoders.load_codec(config, mesh, ["encoder"])
  seeing = encoders.pictures(config, mesh, size)
  draw = views.Draw(Mixture(config.tasks.to_dict()), config.data.views, config.loss.drop_condition,
                    encoders.image_count(size), config.seed)

  @jax.jit
  def compiled(codec, params, frames, character, clips):
    see = partial(image.encode, seeing[0], params) if seeing else None
    return views.look(draw, codec, see, frames, character, clips)

  def look(**arrays: np.ndarray) -> views.Encoded:
    return compiled(codec, seeing and seeing[1], **meshes.to_devices(mesh, arrays))

  return Encoders(look, captions, batch)


def windows(sources: Sequence[Any], bucket: Bucket, deal: Deal, fps: float,
            number: int) -> list[Window] | tuple[str, str]:
  """The pieces of one clip, one after the other, or (name, why it cannot be read). number: over all sources.

  There are none where the clip is assigned to another bucket of the deal.
  """
  place = number
  for source in sources:
    if place < len(source):
      break
    place -= len(source)
  try:
    clip, found = source[place], []
    if deal.assign == "fit" and deal.buckets[assign.fit(assign.size(clip, fps)[None], deal.buckets)[0]] != bucket:
      return []
    span, spare = clip_rows.spans(clip, bucket, fps)
    step = int(span[-1]) + 1
    for first in range(0, spare + 1, step):
      frames, character = clip.look(first + span, video.Size(bucket.height, bucket.width))
      found.append(Window(clip, first, (number * 1000 + len(found)) % NUMBERS, frames, character))
    return found
  except video.Unreadable as error:
    return f"{source.name} record {place}", str(error)


def ahead(pool: ThreadPoolExecutor, work: Callable, items: Iterable, count: int) -> Iterator:
  """`work` of each item in order, up to `count` of them begun before they are wanted."""
  waiting: deque = deque()
  for item in items:
    waiting.append(pool.submit(work, item))
    if len(waiting) > count:
      yield waiting.popleft().result()
  while waiting:
    yield waiting.popleft().result()


def texts(captions: encoders.Captions, wanted: Iterable[str]) -> dict[str, bytes]:
  """Text tokens of each caption, float16, without padding."""
  left, found = sorted(set(wanted)), {}
  for start in range(0, len(left), TEXTS):
    group = left[start:start + TEXTS]
    made = captions(group + [""] * (TEXTS - len(group)))  # one size, so one compilation
    for caption, tokens in zip(group, made, strict=False):
      found[caption] = latents.half(tokens[:1 + max(np.flatnonzero(tokens.any(-1)), default=-1)])
  return found


def encoded(tools: Encoders, found: Sequence[Window]) -> Iterator[LatentClip]:
  """Windows as records, a batch at a time."""
  told = texts(tools.captions, (window.clip.caption for window in found))
  for start in range(0, len(found), tools.batch):
    group = found[start:start + tools.batch]
    filled = [*group, *[group[-1]] * (tools.batch - len(group))]
    made = tools.look(frames=np.stack([window.frames for window in filled]),
                      character=np.stack([window.character for window in filled]),
                      clips=np.array([window.number for window in filled], np.int32))
    made = jax.tree.map(np.asarray, made)
    for row, window in enumerate(group):
      seen = tuple(View(records.pack_mask(mask[row]), latents.half(known[row]), latents.half(shown[row]))
                   for mask, known, shown in zip(made.mask, made.known, made.image, strict=True))
      clip = window.clip
      yield LatentClip(f"{clip.id}+{window.first}", getattr(clip, "film", clip.id), getattr(clip, "source", ""),
                       getattr(clip, "licence", ""), clip.caption, latents.half(made.latents[row]),
                       told[clip.caption], seen)


@dataclass(frozen=True)
class Job:
  """The clips of one split in one bucket, as parts that are done or not."""

  out: Path
  split: str
  bucket: Bucket
  sources: Sequence[Any]

  @property
  def total(self) -> int:
    return sum(len(source) for source in self.sources)

  def parts(self) -> list[tuple[Path, range]]:
    name = f"{latents.size_name(self.bucket)}-{self.split}"
    return [(self.out / f"{name}-{number:05}.arrayrecord", range(first, min(first + PART, self.total)))
            for number, first in enumerate(range(0, self.total, PART))]


def note_of(part: Path) -> Path:
  return part.with_name(f".{part.stem}.json")


def jobs(config: ConfigDict, out: Path) -> list[Job]:
  """What there is to encode. A source may have no held-out clips, or none that are long enough for a bucket. Raises
  BadInput where nothing is to be trained on."""
  made = []
  for split in records.SPLITS:
    found = []
    for source in mixture.parse(config.data.records):
      folder = Path(source.path).expanduser()
      if latents.is_encoded(folder):
        raise BadInput(f"{folder} holds latents already: give the folder of clips that data/pack.py wrote.")
      if split == "train" or source.path.startswith(tfds.PREFIX) or records.count(folder, split):
        found.append(mixture.open_source(source.path, split))
    for bucket in parse(config.data.buckets):
      if split == "train":
        clip_rows.refuse_short(found, bucket, config.data.fps)
      made.append(Job(out, split, bucket, [source for source in found
                                           if not clip_rows.all_short(source, bucket, config.data.fps)]))
  return made


def write_part(config: ConfigDict, tools: Encoders, job: Job, part: Path, numbers: range, bar: tqdm) -> None:
  """Encodes one part of a job and, last, writes the note that says it is done."""
  found, bad = [], []
  deal = Deal(parse(config.data.buckets), config.data.assign)
  work = partial(windows, job.sources, job.bucket, deal, config.data.fps)
  clips, threads = [], max(1, config.data.threads)
  with ThreadPoolExecutor(threads) as pool:
    for made in ahead(pool, work, numbers, threads):
      if isinstance(made, tuple):
        bad.append(made)
        tqdm.write(f"{processes.name()}left out: {made[0]}: {made[1]}", sys.stdout if meshes.leads() else sys.stderr)
      else:
        found += made
      full = len(found) // tools.batch * tools.batch
      clips += [latents.to_bytes(clip) for clip in encoded(tools, found[:full])]
      found = found[full:]
      bar.update()
  clips += [latents.to_bytes(clip) for clip in encoded(tools, found)]
  shard = records.write_shard(part, clips) if clips else None
  unfinished = part.with_suffix(".partial")
  unfinished.write_text(json.dumps({"shard": shard, "bad": bad}))
  unfinished.replace(note_of(part))


def begin(config: ConfigDict, out: Path, say: Callable[[str], None]) -> tuple[dict[str, Any], bool]:
  """(the settings, whether the folder is complete). Raises BadInput for a folder with clips of other settings."""
  settings, path = settings_of(config), out / SETTINGS
  # Settings by which no part was finished yet may have been a mistake, and bind nobody.
  if path.is_file() and any(out.glob(note_of(out / "*").name)):
    changed = workdir.differences(json.loads(path.read_text()), settings)
    if changed:
      raise BadInput(f"{out} holds latents of other settings ({'; '.join(f'{k}: {v}' for k, v in changed.items())}): "
                     "take another --out, or these settings back.")
    if (out / latents.INDEX).is_file():
      say(f"{out} is complete already")
      return settings, True
  elif meshes.leads():
    out.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(settings, indent=2) + "\n")
    unfinished.replace(path)
  elif not processes.appeared([path], processes.SEEN):
    raise BadInput(f"{path}, which process 0 wrote, is not seen here: take a folder that all machines share.")
  return settings, False


def shapes_of(config: ConfigDict, bucket: Bucket) -> Shapes:
  size, codec = pick(SIZES, config.model.size, "model size"), encoders.codec(config)
  f, h, w = latent_shape(codec, bucket.frames, bucket.height, bucket.width, size.patch)
  return Shapes((bucket.frames, h, w), (f, h, w, codec.channels), (size.text_tokens, size.text_width),
                (encoders.image_tokens(config, size), size.image_width))


def encode(config: ConfigDict, out: Path, batch: int = 0, say: Callable[[str], None] = print) -> None:
  """Encodes the clips of config.data.records into the folder `out`, or goes on with it.

  batch: clips at a time on this host, 0 for one a device. Raises BadInput.
  """
  if not config.data.records:
    raise BadInput("no clips to encode: give --config.data.records=FOLDER, made by data/pack.py from films.")
  if config.data.views < 1:
    raise BadInput(f"data.views is {config.data.views}: take at least 1 mask for each clip.")
  shapes = {latents.size_name(bucket): shapes_of(config, bucket) for bucket in parse(config.data.buckets)}
  todo = jobs(config, out)
  settings, complete = begin(config, out, say)
  if complete:
    return
  rank, hosts = jax.process_index(), jax.process_count()
  parts = [(job, part, numbers) for job in todo for part, numbers in job.parts()]
  done = {part for _, part, _ in parts if note_of(part).exists()}
  left = [one for number, one in enumerate(parts) if number % hosts == rank and one[1] not in done]
  tools = load(config, batch or jax.local_device_count())
  if done:
    say(f"goes on: {len(done)} of {len(parts)} parts are done")
  clips = sum(len(numbers) for _, _, numbers in left)
  with tqdm(total=clips, desc="clips encoded", unit="clip", disable=not meshes.leads()) as bar:
    for job, part, numbers in left:
      write_part(config, tools, job, part, numbers, bar)
  if meshes.leads():
    processes.appeared(note_of(part) for _, part, _ in parts)
    finish(settings, todo, shapes, tools, out, say)
  else:
    processes.appeared([out / latents.INDEX])  # or the end of this process would wait for the others, and not for long


def finish(settings: dict[str, Any], todo: Sequence[Job], shapes: dict[str, Shapes], tools: Encoders, out: Path,
           say: Callable[[str], None]) -> None:
  """Writes the index over all parts."""
  sizes: dict[str, Any] = {name: {"shapes": asdict(shape), "splits": {}} for name, shape in shapes.items()}
  bad = 0
  for job in todo:
    notes = [json.loads(note_of(part).read_text()) for part, _ in job.parts()]
    bad += sum(len(note["bad"]) for note in notes)
    sizes[latents.size_name(job.bucket)]["splits"][job.split] = [note["shard"] for note in notes if note["shard"]]
  counts = {split: sum(shard["records"] for size in sizes.values() for shard in size["splits"][split])
            for split in records.SPLITS}
  if not counts["train"]:
    raise BadInput(f"none of the clips could be encoded, {bad} were left out (see above): pack them again.")
  empty = np.frombuffer(texts(tools.captions, [""])[""], np.float16)
  latents.write_index(out, settings, empty, sizes)
  say(f"{counts['train']} clips to train on and {counts['held_out']} held out, {bad} left out, are latents in {out}")
