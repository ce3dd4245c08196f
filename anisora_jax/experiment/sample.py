"""A trained run becomes films: of what a user gives, or of held-out clips beside their truth."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from jaxtyping import Bool, UInt8
from tqdm.auto import tqdm

from anisora_jax import keys
from anisora_jax.errors import BadInput, pick
from anisora_jax.evaluation import likeness, page
from anisora_jax.experiment.parts import loader
from anisora_jax.experiment.studio import Masks, Studio
from anisora_jax.loaders.buckets import Bucket
from anisora_jax.models.codec import latent_shape
from anisora_jax.parallel import mesh as meshes
from anisora_jax.sampling import film, given, prompts
from anisora_jax.sampling.request import Request, lay_out
from anisora_jax.sampling.sheet import Sheet, write_sheet
from anisora_jax.tasks.conditions import cells_touched
from anisora_jax.tasks.masks import TASKS, Scene
from anisora_jax.training import report

ENDINGS = (".mp4", ".gif", ".png")  # of what is written of one film
EXACT = 100.0  # dB in a mean; of a still clip that is repeated PSNR is infinite, which would be all of the mean


@dataclass(frozen=True)
class Order:
  """One film to make: what is given, its caption, where it goes (OUT.mp4, .gif and .png), and the seed of its noise.

  out: a name to which these endings are added, so that it may hold dots. line: of a prompt file, for messages.
  """

  request: Request
  prompt: str
  out: Path
  seed: int
  line: str = ""


def out_of(word: str) -> Path:
  """`out` of an Order as --out says it, one of its endings taken off. Raises BadInput where it names no file."""
  path = Path(word)
  name = path.stem if path.suffix in ENDINGS else path.name
  if name in ("", "..", *ENDINGS):
    raise BadInput(f"--out {word!r} names no film: give a name such as out/film, to which {', '.join(ENDINGS)} are "
                   "added.")
  return path.with_name(name)


@dataclass(frozen=True)
class Asked:
  """What is asked of a film's size, None where nothing is. fit: as of a Request."""

  frames: int | None = None
  height: int | None = None
  width: int | None = None
  fit: str = ""


def size_of(studio: Studio, picture: str, asked: Asked) -> dict[str, Any]:
  """The size of a film and how pictures come to it, as fields of a Request.

  The size is as asked, or sample.area pixels in the shape of the first picture, which is then brought to it as upstream
  does, or that of training.
  """
  bucket, settings = studio.parts.buckets[0], studio.config.sample
  frames = asked.frames or bucket.frames
  if asked.height or asked.width or not (settings.area and picture):
    return dict(frames=frames, height=asked.height or bucket.height, width=asked.width or bucket.width, fit=asked.fit)
  like = given.read_first(picture).shape[:2]
  cell, rule = studio.parts.codec.spatial * studio.parts.size.patch, settings.area_rule
  height, width = prompts.size_of(*like, settings.area, cell, rule)
  made = dict(frames=frames, height=height, width=width)
  return {**made, "fit": asked.fit} if asked.fit else {**made, "fit": prompts.FITS[rule], "like": like}


def orders_of(studio: Studio, file: str, asked: Asked, ending: str, out: Path, seed: int) -> list[Order]:
  """The films of a prompt file of AniSora's form, OUT-000 and so on. ending: of every prompt. Raises BadInput.

  What brings a line's first picture to the film's size brings all of them, as AniSora does.
  """
  made = []
  for number, line in enumerate(prompts.read_prompts(file)):
    size = {**size_of(studio, line.images[0] if line.images else "", asked), "like": None}
    frames = prompts.keyframes(line, size["frames"])
    request = Request(**size, fps=studio.config.data.fps, keyframes=frames, listed=next(iter(frames), None))
    made.append(Order(request, f"{line.prompt} {ending}".strip(), out.with_name(f"{out.name}-{number:03}"), seed,
                      f"{file}, line {line.number}: "))
  return made


def make(studio: Studio, orders: Sequence[Order]) -> None:
  """Makes films of what a user gives, each with a gif and a contact sheet. All of it is checked before the first."""
  cell = studio.parts.codec.spatial
  for order in orders:
    try:
      size = order.request.frames, order.request.height, order.request.width
      latent_shape(studio.parts.codec, *size, studio.parts.size.patch)
      studio.refuse_unseen(lay_out(order.request, cell)[1][None])
    except BadInput as mistake:
      raise BadInput(f"{order.line}{mistake}") from None
  studio.prepare([order.prompt for order in orders])
  for order in tqdm(orders, desc="films", unit="film", disable=len(orders) == 1 or not meshes.leads()):
    canvas, mask = lay_out(order.request, cell)
    made = studio.films(canvas[None], mask[None], [order.prompt], order.seed, order.request.listed)[0]
    if not meshes.leads():
      continue
    shown = slice(None, -1) if order.request.loop else slice(None)  # its last frame is the first of the next round
    write_films(order.out, made[shown], order.request.fps)
    write_sheet(ended(order.out, ".png"), Sheet(order.out.name, order.prompt, canvas, mask, made))


def ended(path: Path, ending: str) -> Path:
  """The path with an ending; with_suffix would put it in the place of what follows the last dot."""
  return path.with_name(path.name + ending)


def write_films(path: Path, made: UInt8[np.ndarray, "F H W 3"], fps: float) -> None:
  """PATH.mp4 and PATH.gif, small frames enlarged by a whole number: H.264 halves the colour's resolution."""
  times = max(1, 200 // made.shape[2])
  film.write_mp4(ended(path, ".mp4"), made, fps, times)
  film.write_gif(ended(path, ".gif"), made, fps, times)


def task_masks(studio: Studio, task: str, character: Bool[np.ndarray, "b F H W"], number: int) -> Masks:
  """The masks of one task for a batch of held-out clips: the same frames in all, the region of each its own."""
  codec = studio.parts.codec
  key = keys.key(studio.config.seed, number, "task")
  draw = jax.vmap(lambda cells: pick(TASKS, task, "task")(key, Scene(cells, codec.temporal)))
  return np.asarray(draw(cells_touched(jnp.asarray(character), codec.spatial)))


def shown_tasks(studio: Studio) -> tuple[str, ...]:
  """Tasks of held-out clips, of those that the network can be told of."""
  if studio.parts.size.given:
    return "first", "first_last", "keyframes", "continuation", "character"
  return ("first", "continuation") if studio.config.sample.multiplier != 1 else ("none",)


def check_tasks(studio: Studio, tasks: Sequence[str], count: int) -> None:
  """Raises BadInput for a task that there is not, or that gives what the network could not see.

  count: batches, each of which draws its own masks.
  """
  bucket = studio.parts.buckets[0]
  nobody = np.zeros((1, bucket.frames, bucket.height, bucket.width), bool)
  for task in tasks:
    for mask in [task_masks(studio, task, nobody, number) for number in range(count)]:
      try:
        studio.refuse_unseen(mask)
      except BadInput as mistake:
        raise BadInput(f"task {task!r}: {mistake}") from None


@dataclass(frozen=True)
class Shown:
  """One held-out clip, made anew. psnr: of what was hidden, in dB, of the model and of the baselines."""

  task: str
  caption: str
  truth: UInt8[np.ndarray, "F H W 3"]
  mask: Bool[np.ndarray, "F h w"]
  made: UInt8[np.ndarray, "F H W 3"]
  psnr: dict[str, float]


def compare(studio: Studio, task: str, count: int, bucket: Bucket) -> list[Shown]:
  """Makes `count` held-out clips under one task and measures them where they were hidden."""
  shown: list[Shown] = []
  clips = loader(studio.parts, studio.config, "held_out", (bucket,), whole=True)
  with tqdm(total=count, desc=task, unit="clip", disable=not meshes.leads()) as bar:
    for number, batch in enumerate(clips):
      truth, mask = batch["frames"], task_masks(studio, task, batch["character"], number)
      hidden = repeat(~mask, "b F h w -> b F (h p) (w q)", p=studio.parts.codec.spatial, q=studio.parts.codec.spatial)
      usable = (batch["ok"] > 0) & hidden.any((1, 2, 3))
      if usable.any():
        made = studio.films(truth, mask, batch["caption"], number)
        anchors = np.flatnonzero(mask[usable].all((0, 2, 3))).tolist()
        rivals = {"model": made, "repeat first": likeness.repeat_first(truth)}
        if len(anchors) > 1:
          rivals["cross-fade"] = likeness.cross_fade(truth, anchors)
        psnr = {name: likeness.psnr(rival[usable], truth[usable], hidden[usable]) for name, rival in rivals.items()}
        for row, place in enumerate(np.flatnonzero(usable)[:count - len(shown)]):
          shown.append(Shown(task, batch["caption"][place], truth[place], mask[place], made[place],
                             {name: float(values[row]) for name, values in psnr.items()}))
          bar.update()
      if len(shown) >= count:
        break
  clips.close()
  if not shown:
    raise BadInput(f"no held-out clip has anything hidden under task {task!r}: pack more films, or take another task.")
  return shown


def score(shown: Sequence[Shown]) -> page.Score:
  """The means over the clips of one task, in which a clip that is made exactly counts EXACT dB."""
  means = {name: float(np.mean([min(one.psnr[name], EXACT) for one in shown])) for name in shown[0].psnr}
  return page.Score(shown[0].task, len(shown), means.pop("model"), means)


def exhibit(one: Shown, path: Path, fps: float) -> page.Exhibit:
  """Writes a clip's mp4, gif and contact sheet."""
  note = ", ".join(f"{name} {value:.2f} dB" for name, value in one.psnr.items())
  write_films(path, one.made, fps)
  write_sheet(ended(path, ".png"), Sheet(f"{one.task}: {note}", one.caption, one.truth, one.mask, one.made,
                                          one.truth))
  return page.Exhibit(one.task, one.caption, ended(path, ".png"), ended(path, ".mp4"), ended(path, ".gif"), note)


def gallery(studio: Studio, folder: Path, tasks: Sequence[str], count: int, show: int,
            say: Callable[[str], None] = print) -> list[page.Score]:
  """Remakes held-out clips under each task; writes films, sheets, scores.json and report.html into folder/samples.

  tasks: none for `shown_tasks`.
  """
  out, bucket = folder / "samples", studio.parts.buckets[0]
  if studio.parts.encoded:
    raise BadInput(f"{folder} was trained on latents, and held-out films are measured against clips: add --records "
                   "FOLDER, the clips that were encoded.")
  tasks = tasks or shown_tasks(studio)
  check_tasks(studio, tasks, 1 if studio.parts.size.given else count)
  scores, exhibits = [], []
  for task in tasks:
    shown = compare(studio, task, count, bucket)
    scores.append(score(shown))
    exhibits += [exhibit(one, out / f"{task}-{number}", studio.config.data.fps) for number, one in
                 enumerate(shown[:show]) if meshes.leads()]
    rivals = ", ".join(f"{name} {value:.2f} dB" for name, value in scores[-1].baselines.items())
    say(f"{task}: PSNR of {len(shown)} held-out clips where hidden: model {scores[-1].model:.2f} dB, {rivals}")
  if not meshes.leads():
    return scores
  told = folder / "measures.jsonl"  # published weights have none
  measures = report.read_measures(told) if told.exists() else []
  settings = studio.config.sample
  facts = {"parameters": f"{studio.parts.size.parameters():,}", "trained": studio.trained,
           "clips": str(bucket), "records": studio.config.data.records, "devices": meshes.describe(studio.parts.mesh),
           "sampling": f"{settings.solver}, {settings.steps} steps, guidance {settings.guidance:g}"}
  plain = [{"task": one.task, "clips": one.clips, "model": one.model, **one.baselines} for one in scores]
  film.land(out / "scores.json", (json.dumps(plain, indent=2) + "\n").encode())
  page.write_page(out / "report.html", page.Report(folder.name, facts, measures, scores, exhibits))
  say(f"look at {out / 'report.html'}")
  return scores
