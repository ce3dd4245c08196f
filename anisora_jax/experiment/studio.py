"""A trained or published network with its codec and encoders, ready to make films."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, PyTree, UInt8
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from anisora_jax import keys
from anisora_jax.checkpoints.orbax import Checkpoints
from anisora_jax.diffusion.times import schedule
from anisora_jax.errors import BadInput, pick
from anisora_jax.experiment import encoders, origin, weights
from anisora_jax.experiment.parts import Parts, abstract_params, abstract_trained, assemble
from anisora_jax.experiment.runs import saved_config
from anisora_jax.loaders.buckets import parse
from anisora_jax.models.attention import PATTERNS
from anisora_jax.models.codec import Codec
from anisora_jax.models.wan import image
from anisora_jax.parallel import mesh as meshes
from anisora_jax.sampling import guidance, plans, sampler
from anisora_jax.sampling.solvers import SOLVERS, Row, Solver
from anisora_jax.tasks import conditions
from anisora_jax.tasks.conditions import Condition
from anisora_jax.training import state
from anisora_jax.training.step import unit

Films = UInt8[np.ndarray, "b F H W 3"]
Masks = Bool[np.ndarray, "b F h w"]
SLOW = 5  # seconds after which a film shows how many of its steps are done


@dataclass
class Rack:
  """The parameters of one network, or of two experts, one of which at a time is on the devices; the other waits in the
  host's memory. readers: put the parameters of each onto the devices, each called once."""

  readers: Sequence[Callable[[], PyTree]]
  here: int | None = None
  params: PyTree = None
  parked: dict[int, PyTree] = field(default_factory=dict)

  def get(self, number: int) -> PyTree:
    """The parameters of an expert, on the devices."""
    number = min(number, len(self.readers) - 1)
    if number != self.here:
      self._park()
      if number in self.parked:
        self.params = jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind("device")),
                                   self.parked[number])
      else:
        self.params = self.readers[number]()
      self.here = number
    return self.params

  def _park(self) -> None:
    if self.here is None:
      return
    if self.here not in self.parked:
      self.parked[self.here] = jax.block_until_ready(jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host")), self.params))
    jax.tree.map(lambda x: x.delete(), self.params)


@dataclass(frozen=True)
class Studio:
  """What makes films. trained: for people. told: the captions that were encoded."""

  config: ConfigDict
  parts: Parts
  rack: Rack
  trained: str
  told: dict[str, Float[np.ndarray, "s e"]] = field(default_factory=dict)

  @cached_property
  def codec(self) -> Codec:
    return encoders.load_codec(self.config, self.parts.mesh)

  @cached_property
  def seeing(self) -> tuple | None:
    return encoders.pictures(self.config, self.parts.mesh, self.parts.size)

  @cached_property
  def captions(self) -> encoders.Captions:
    return encoders.captions(self.config, self.parts.mesh, self.parts.size)

  def text(self, captions: Sequence[str]) -> Float[np.ndarray, "b s e"]:
    """Text tokens; each caption is encoded once."""
    new = sorted({caption for caption in captions if caption not in self.told})
    if new:
      self.told.update(zip(new, self.captions(new), strict=True))
    return np.stack([self.told[caption] for caption in captions])

  def prepare(self, captions: Sequence[str]) -> None:
    """Encodes all captions there will be, and lets the text encoder go, before the network needs the memory."""
    self.text([*captions, self.config.sample.negative])
    self.__dict__.pop("captions", None)

  @cached_property
  def _look(self) -> Callable:
    count, see = encoders.image_count(self.parts.size), self.seeing and partial(image.encode, self.seeing[0])

    @partial(jax.jit, out_shardings=meshes.whole(self.parts.mesh))
    def look(codec: Codec, params: PyTree, frames: jax.Array, mask: jax.Array, at: jax.Array | None) -> Condition:
      films = unit(frames)
      given = conditions.condition(films, mask, codec.encode, codec.temporal)
      if not count:
        return given
      shown = rearrange(conditions.pictures(films, mask, count, at), "b k H W c -> (b k) H W c")
      return given.replace(image=rearrange(see(params, shown), "(b k) i y -> b (k i) y", k=count))

    return look

  @cached_property
  def _steps(self) -> dict[float, Callable]:
    """Guidance -> one step of sampling, compiled."""
    solver, velocity = SOLVERS[self.config.sample.solver], self.parts.method.velocity
    options = self.parts.compiler_options
    return {scale: jax.jit(partial(_step, velocity, solver, scale), compiler_options=options)
            for scale in self.scales}

  @property
  def scales(self) -> tuple[float, float]:
    """Guidance of the first and the second expert."""
    settings = self.config.sample
    low = settings.guidance if settings.guidance_low < 0 else settings.guidance_low
    return float(settings.guidance), float(low)

  @cached_property
  def _decode(self) -> Callable:
    return jax.jit(lambda codec, x: jnp.clip(jnp.round((codec.decode(x) + 1) * 127.5), 0, 255).astype(jnp.uint8),
                   out_shardings=meshes.whole(self.parts.mesh))

  def latents(self, frames: Films, mask: Masks, captions: Sequence[str], noise: jax.Array | None = None,
              number: int = 0, listed: int | None = None) -> jax.Array:
    """Makes a batch of films as latents. As `films`; noise: to start from, by default drawn for `number`."""
    self.refuse_unseen(mask)
    settings, mesh = self.config.sample, self.parts.mesh
    text, negative = (meshes.everywhere(mesh, self.text(words))
                      for words in (captions, [settings.negative] * len(captions)))
    params = self.seeing and self.seeing[1]
    at = None if listed is None else meshes.everywhere(mesh, np.full(len(frames), listed, np.int32))
    given = self._look(self.codec, params, meshes.everywhere(mesh, frames), meshes.everywhere(mesh, mask), at)
    if settings.multiplier == 1:
      given = given.told_by_mask_alone()
    frozen = np.asarray(given.frozen).all(0)
    sigmas = np.asarray(schedule(settings.steps, settings.shift, settings.start, settings.end), np.float32)
    plan = plans.sync(sigmas, np.where(frozen, settings.multiplier, 1.0).astype(np.float32), settings.whole)
    if noise is None:
      noise = jax.random.normal(keys.key(self.config.seed, number, "sample"), given.known.shape)
    x = sampler.begin(plan, noise, given.known)
    x = self._walk(plan, x, (given, text, negative))
    # Frames that were given with some noise are free to change.
    held = given.held & ~(frozen & (settings.multiplier > 0))[:, None, None, None]
    return jnp.where(held, given.known, x)

  def refuse_unseen(self, mask: Masks) -> None:
    """Raises BadInput for latent frames of which something is given that a network without a mask could not see."""
    if self.parts.size.given:
      return
    stride = self.parts.codec.temporal
    packed = np.asarray(conditions.pack(jnp.asarray(mask), stride)) > 0
    told = packed.all((0, 2, 3, 4)) & (self.config.sample.multiplier != 1)
    frames = packed.any((0, 2, 3, 4)) & ~told
    if not frames.any():
      return
    number = int(frames.argmax())
    covered = f"frames {stride * (number - 1) + 1} .. {stride * number}" if number else "frame 0"
    raise BadInput(f"model size {self.config.model.size!r} is told of given frames by their noise time alone, and of "
                   f"{covered} only a part is given" + (" with sample.multiplier = 1" if not number else "") +
                   ": give all of these frames whole, as a clip with --keep does, or take a model with a mask.")

  def _walk(self, plan: plans.Plan, x: jax.Array, shown: tuple) -> jax.Array:
    carry = x, SOLVERS[self.config.sample.solver].start(x)
    pieces = sampler.pieces(plan, self.config.sample.boundary)
    settings = dict(desc="steps", unit="step", leave=False, delay=SLOW, disable=not meshes.leads())
    with tqdm(total=len(plan.told), **settings) as bar:
      for expert, piece in pieces:
        params, step = self.rack.get(expert), self._steps[self.scales[expert]]
        rows = sampler.rows(plan, piece)
        for row in range(len(rows.tau)):
          carry = step(params, jax.tree.map(lambda leaf, row=row: leaf[row:row + 1], rows), carry, shown)
          jax.block_until_ready(carry)  # so that the bar tells the truth
          bar.update()
    return carry[0]

  def films(self, frames: Films, mask: Masks, captions: Sequence[str], number: int, listed: int | None = None) -> Films:
    """Makes a batch of films. frames: the given pixels, hidden ones are not read. number: of the batch, for its noise.
    listed: frame whose picture an image encoder sees, by default the first that is given whole.

    A frame is frozen, at noise time 0 in every step, where it is given whole in all films of the batch, unless
    sample.multiplier says otherwise.
    """
    return np.asarray(self._decode(self.codec, self.latents(frames, mask, captions, None, number, listed)))


def _step(velocity: Callable, solver: Solver, scale: float, params: PyTree, row: Row, carry: tuple[jax.Array, PyTree],
          shown: tuple) -> tuple[jax.Array, PyTree]:
  """One row of a plan: the compiled part.

  carry: latents and the solver's memory. shown: what is given, the text, and the text to be guided away from.
  """
  given, text, negative = shown

  def network(text, x, told):
    return velocity(params, x, told, given, text)

  guided = guidance.text(partial(network, text), partial(network, negative), scale)
  return sampler.walk(guided, row, *carry, solver)


def _of(config: ConfigDict, count: int | None) -> Parts:
  """The parts of a config for sampling: one film at a time, whose tokens are what is worth splitting.

  Of a number of devices over which the weights cannot be split, as 6, the largest power of two work.
  """
  nearby = pick(PATTERNS, config.model.attention, "attention pattern").nearby
  config.mesh = {"clip" if nearby else "seq": -1}
  config.data.packed = 0
  config.data.buckets = ",".join(str(replace(bucket, seq=0)) for bucket in parse(config.data.buckets))
  pick(SOLVERS, config.sample.solver, "solver")
  made = assemble(config, count)
  usable = 2 ** (made.mesh.size.bit_length() - 1)
  if usable == made.mesh.size or jax.process_count() > 1:
    return made
  try:
    abstract_params(made)
  except BadInput as error:
    print(f"works on {usable} of {made.mesh.size} devices: {error}", file=sys.stderr)
    return assemble(config, usable)
  return made


def changed(config: ConfigDict, changes: Mapping[str, object]) -> ConfigDict:
  """The config with other values of some fields, "sample.steps" or "pretrained"; None leaves one as it is.

  Raises BadInput for the guidance of a second expert that is not there.
  """
  config.update_from_flattened_dict({name: value for name, value in changes.items() if value is not None})
  if changes.get("sample.guidance_low") is not None and not config.sample.boundary:
    raise BadInput("--guidance_low is of the second of two experts, and here is one network: give --guidance.")
  return config


def open_run(folder: Path, changes: Mapping[str, object], adapters: str = "", count: int | None = None) -> Studio:
  """The run in a folder, its averaged parameters, onto today's devices.

  changes: as of `changed`. adapters: as model.adapters, to be added to what the run made. A run that tuned one of two
  experts is joined by the other from the weights that it started from. Raises BadInput.
  """
  config = changed(saved_config(folder), changes)
  parts = _of(config, count)
  checkpoints = Checkpoints(folder / "checkpoints", keep=config.train.keep)
  if not checkpoints.steps():
    raise BadInput(f"{folder} holds no finished checkpoint: train it first, with train --workdir {folder}.")
  tuned = config.model.expert
  origin.adapters_of(adapters, tuned)  # refused now, not after the captions are encoded
  base = origin.source_of(parts, config, tuned, folder) if parts.lora else None

  def read() -> PyTree:
    if parts.lora:
      with checkpoints:
        _, now, _ = checkpoints.restore(state.TrainState(step=..., params=..., ema=abstract_trained(parts), opt=...))
      start = origin.read(parts, config, base, True, tuned)
      made = origin.folded(start, now.ema, parts.lora.scale)
    else:  # stored in float32 and wanted in the dtype of arithmetic
      made = weights.read(weights.find(folder, ema=True)[""], abstract_params(parts, kept=True))
    return origin.with_adapters(made, parts, adapters, tuned)

  readers = [read]
  if config.sample.boundary:
    if tuned not in weights.EXPERTS:
      raise BadInput(f"{folder} trained one network and sample.boundary is {config.sample.boundary:g}, for two "
                     "experts: set it to 0.")
    readers = [read if name == tuned else partial(_read, parts, config, adapters, name) for name in weights.EXPERTS]
  return Studio(config, parts, Rack(readers), f"{checkpoints.steps()[-1]} steps")


def _read(parts: Parts, config: ConfigDict, adapters: str, expert: str) -> PyTree:
  made = origin.read(parts, config, origin.source_of(parts, config, expert), True, expert)
  return origin.with_adapters(made, parts, adapters, expert)


def open_weights(config: ConfigDict, changes: Mapping[str, object], adapters: str = "",
                 count: int | None = None) -> Studio:
  """Published weights as they are. changes, adapters: as of `open_run`. Raises BadInput."""
  config = changed(config, {**changes, "lora.rank": 0})
  parts = _of(config, count)
  experts = weights.EXPERTS if config.sample.boundary else [config.model.expert]
  for expert in experts:  # refused now, not when a film is half made
    if origin.source_of(parts, config, expert) is None:
      raise BadInput("no weights to sample from: give --workdir of a run, or --config.pretrained=FOLDER or "
                     "--config.model.weights=PATH.")
    origin.adapters_of(adapters, expert)
  readers = [partial(_read, parts, config, adapters, expert) for expert in experts]
  return Studio(config, parts, Rack(readers), "as published")
