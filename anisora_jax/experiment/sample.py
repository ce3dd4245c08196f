"""A trained run becomes films: of what a user gives, or of held-out clips beside their truth."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from jaxtyping import Bool, PyTree, UInt8
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from anisora_jax import keys
from anisora_jax.adapters import lora
from anisora_jax.checkpoints.orbax import Checkpoints
from anisora_jax.diffusion.times import schedule
from anisora_jax.errors import BadInput, pick
from anisora_jax.evaluation import likeness, page
from anisora_jax.experiment import weights
from anisora_jax.experiment.parts import Parts, abstract_params, abstract_trained, assemble, loader, saved_config
from anisora_jax.loaders.buckets import Bucket
from anisora_jax.models.codec import latent_shape
from anisora_jax.parallel import mesh as meshes
from anisora_jax.sampling import film, guidance, plans, sampler
from anisora_jax.sampling.request import Request, lay_out
from anisora_jax.sampling.sheet import Sheet, write_sheet
from anisora_jax.sampling.solvers import SOLVERS, Solver
from anisora_jax.shapes import Latents, Text
from anisora_jax.tasks.conditions import Condition, cells_touched, condition
from anisora_jax.tasks.masks import TASKS, Scene
from anisora_jax.training import report, state, step

Films = UInt8[np.ndarray, "b F H W 3"]
Masks = Bool[np.ndarray, "b F h w"]


@dataclass(frozen=True)
class Studio:
  """A trained network, ready to make films. params: the averaged ones; trained: the step they are of."""

  config: ConfigDict
  parts: Parts
  params: PyTree
  trained: int

  @cached_property
  def _run(self) -> Callable:
    return jax.jit(partial(_walk, self.parts.method.velocity, SOLVERS[self.config.sample.solver],
                           float(self.config.sample.guidance)))

  def films(self, frames: Films, mask: Masks, captions: Sequence[str], number: int) -> Films:
    """Makes a batch of films. frames: the given pixels, hidden ones are not read. number: of the batch, for its noise.

    A frame is frozen, its noise time 0 at every step, where it is given whole in all films of the batch.
    """
    codec, settings = self.parts.codec, self.config.sample
    given = condition(step.unit(jnp.asarray(frames)), jnp.asarray(mask), codec.encode, codec.temporal)
    frozen = np.asarray(given.frozen).all(0)
    sigmas = np.asarray(schedule(settings.steps, settings.shift), np.float32)
    plan = plans.sync(sigmas, np.where(frozen, settings.multiplier, 1.0).astype(np.float32))
    text = jnp.asarray(self.parts.words(captions))
    noise = jax.random.normal(keys.key(self.config.seed, number, "sample"), given.known.shape)
    made = codec.decode(self._run(self.params, plan, noise, (given, text)))
    return np.asarray(jnp.clip(jnp.round((made + 1) * 127.5), 0, 255).astype(jnp.uint8))


def _walk(velocity: Callable, solver: Solver, scale: float, params: PyTree, plan: plans.Plan, noise: Latents,
          shown: tuple[Condition, Text]) -> Latents:
  """Samples latents: the compiled part. shown: what is given, and the text."""
  given, text = shown

  def network(text, x, told):
    return velocity(params, x, told, given, text)

  guided = guidance.text(partial(network, text), partial(network, jnp.zeros_like(text)), scale)
  return sampler.sample(guided, plan, noise, given.known, solver, given.held)


def restore(folder: Path, changes: dict[str, object], count: int | None = None) -> Studio:
  """The run in a folder with other sampling settings. Reads the averaged parameters only, onto today's devices."""
  config = saved_config(folder)
  config.sample.update({name: value for name, value in changes.items() if value is not None})
  config.mesh = ConfigDict({"seq": -1})  # one film at a time: its tokens are what is worth splitting
  pick(SOLVERS, config.sample.solver, "solver")
  parts = assemble(config, count)
  with Checkpoints(folder / "checkpoints", keep=config.train.keep) as checkpoints:
    if not checkpoints.steps():
      raise BadInput(f"{folder} holds no finished checkpoint: train it first, with train --workdir {folder}.")
    trained, now, _ = checkpoints.restore(state.TrainState(step=..., params=..., ema=abstract_trained(parts), opt=...))
  params = now.ema
  if parts.lora:
    base = weights.source(Path(config.model.weights), parts.size)
    params = lora.join(weights.read(base, abstract_params(parts)), params)
  return Studio(config, parts, params, trained)


def make(studio: Studio, request: Request, prompt: str, out: Path, seed: int) -> None:
  """Makes one film of what a user gives: OUT.mp4, .gif and .png (the contact sheet)."""
  latent_shape(studio.parts.codec, request.frames, request.height, request.width)
  canvas, mask = lay_out(request, studio.parts.codec.spatial)
  made = studio.films(canvas[None], mask[None], [prompt], seed)[0]
  shown = slice(None, -1) if request.loop else slice(None)  # the last frame of a loop is the first of its next round
  write_films(out, made[shown], request.fps)
  write_sheet(out.with_suffix(".png"), Sheet(out.stem, prompt, canvas, mask, made))


def write_films(path: Path, made: UInt8[np.ndarray, "F H W 3"], fps: float) -> None:
  """PATH.mp4 and PATH.gif, small frames enlarged by a whole number: H.264 halves the colour's resolution."""
  times = max(1, 200 // made.shape[2])
  film.write_mp4(path.with_suffix(".mp4"), made, fps, times)
  film.write_gif(path.with_suffix(".gif"), made, fps, times)


def task_masks(studio: Studio, task: str, character: Bool[np.ndarray, "b F H W"], number: int) -> Masks:
  """The masks of one task for a batch of held-out clips: the same frames in all, the region of each its own."""
  codec = studio.parts.codec
  key = keys.key(studio.config.seed, number, "task")
  draw = jax.vmap(lambda cells: pick(TASKS, task, "task")(key, Scene(cells, codec.temporal)))
  return np.asarray(draw(cells_touched(jnp.asarray(character), codec.spatial)))


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
  clips = loader(studio.parts, studio.config, "held_out", (bucket,))
  with tqdm(total=count, desc=task, unit="clip") as bar:
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
  """The means over the clips of one task."""
  means = {name: float(np.mean([one.psnr[name] for one in shown])) for name in shown[0].psnr}
  return page.Score(shown[0].task, len(shown), means.pop("model"), means)


def exhibit(one: Shown, path: Path, fps: float) -> page.Exhibit:
  """Writes a clip's mp4, gif and contact sheet."""
  note = ", ".join(f"{name} {value:.2f} dB" for name, value in one.psnr.items())
  write_films(path, one.made, fps)
  write_sheet(path.with_suffix(".png"), Sheet(f"{one.task}: {note}", one.caption, one.truth, one.mask, one.made,
                                              one.truth))
  return page.Exhibit(one.task, one.caption, path.with_suffix(".png"), path.with_suffix(".mp4"),
                      path.with_suffix(".gif"), note)


def gallery(studio: Studio, folder: Path, tasks: Sequence[str], count: int, show: int,
            say: Callable[[str], None] = print) -> list[page.Score]:
  """Remakes held-out clips under each task; writes films, sheets, scores.json and report.html into folder/samples."""
  out, bucket = folder / "samples", studio.parts.buckets[0]
  scores, exhibits = [], []
  for task in tasks:
    shown = compare(studio, task, count, bucket)
    scores.append(score(shown))
    exhibits += [exhibit(one, out / f"{task}-{number}", studio.config.data.fps) for number, one in
                 enumerate(shown[:show])]
    rivals = ", ".join(f"{name} {value:.2f} dB" for name, value in scores[-1].baselines.items())
    say(f"{task}: PSNR of {len(shown)} held-out clips where hidden: model {scores[-1].model:.2f} dB, {rivals}")
  measures = report.read_measures(folder / "measures.jsonl")
  settings = studio.config.sample
  facts = {"parameters": f"{studio.parts.size.parameters():,}", "trained": f"{studio.trained} steps",
           "clips": str(bucket), "records": studio.config.data.records, "devices": meshes.describe(studio.parts.mesh),
           "sampling": f"{settings.solver}, {settings.steps} steps, guidance {settings.guidance:g}"}
  plain = [{"task": one.task, "clips": one.clips, "model": one.model, **one.baselines} for one in scores]
  film.land(out / "scores.json", (json.dumps(plain, indent=2) + "\n").encode())
  page.write_page(out / "report.html", page.Report(folder.name, facts, measures, scores, exhibits))
  say(f"look at {out / 'report.html'}")
  return scores
