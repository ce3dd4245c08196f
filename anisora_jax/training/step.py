"""The pure training step: state, batch -> state, measures. One compiled step serves all tasks.

Everything random is drawn for each sample from (seed, step, purpose, number in the batch), so that a resumed run,
another mesh and any split into micro-batches draw the same. A sample is a clip, several of which may share a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

from anisora_jax import keys
from anisora_jax.adapters import lora
from anisora_jax.diffusion import objective, path
from anisora_jax.diffusion.times import TimeDraw
from anisora_jax.errors import BadInput
from anisora_jax.models.codec import Codec
from anisora_jax.parallel import mesh as meshes
from anisora_jax.shapes import Films, Frames, Latents, Scalar, Times
from anisora_jax.tasks.conditions import Condition, cells_touched, condition, of_latents
from anisora_jax.tasks.masks import Mixture
from anisora_jax.training import packed
from anisora_jax.training.state import TrainState

Batch = Mapping[str, Array]  # see `loaders.mixture` and, for stop, `training.loop`
Measures = dict[str, Array]


@dataclass(frozen=True)
class Method:
  """What is trained, and how tasks, times and noise are drawn.

  velocity: (params, x, t, condition, text) -> velocity. drop_text, drop_condition: probability that a sample is trained
  without its caption, or with nothing given. given: the share of their noise time that frames have which are given
  whole: at 0 they are clean and need no loss; above, they are trained like the others. micro_batches: parts of a batch
  whose gradients are added up. replicas: parts of it, as many as the mesh axis says, whose gradients are added up on
  their own devices first; shares: splits these sums, [r, ...], as parameters are, for replicas to send each other
  shares. blank: as of Frozen.
  """

  velocity: Callable[[PyTree, Latents, Times, Condition, Array], Latents]
  codec: Codec
  tasks: Mixture
  times: TimeDraw
  weight: str = "none"
  drop_text: float = 0.1
  drop_condition: float = 0.05
  given: float = 0.0
  seed: int = 0
  micro_batches: int = 1
  replicas: int = 1
  shares: Callable[[PyTree], PyTree] = lambda grads: grads
  blank: PyTree = 0.0

  def __post_init__(self):
    for name in ("drop_text", "drop_condition", "given"):
      if not 0 <= getattr(self, name) <= 1:
        raise BadInput(f"{name} = {getattr(self, name)} is no share: take 0 .. 1.")
    if self.micro_batches < 1:
      raise BadInput(f"micro_batches = {self.micro_batches}: take 1 or more.")


@struct.dataclass
class Frozen:
  """What a step reads and never changes: an argument of compiled functions, or it would become their constants.

  base: parameters beside which the trained ones stand, as adapters; None where all are trained. blank: text tokens of
  the empty caption, [s, e], or 0.
  """

  codec: Codec
  base: PyTree | None = None
  blank: PyTree = 0.0


def bind(method: Method, frozen: Frozen | None) -> Method:
  """The method with these frozen parts; None: with its own codec, all parameters trained."""
  if frozen is None:
    return method
  velocity, base = method.velocity, frozen.base
  if base is not None:
    def velocity(params, *rest):
      return method.velocity(lora.join(base, params), *rest)
  return replace(method, codec=frozen.codec, velocity=velocity, blank=frozen.blank)


@struct.dataclass
class Lesson:
  """One noised batch: what the network gets and what it should say.

  share: of its sample's noise time, a frame's. ok: 1 where a clip could be read, of each row or each frame.
  """

  clean: Latents
  noise: Latents
  t: Times
  share: Times
  given: Condition
  text: Float[Array, "b s e"] | Float[Array, "b k s e"]
  ok: Float[Array, "b _"]


def unit(frames: Films) -> Frames:
  """0 .. 255 -> [-1, 1]."""
  return frames.astype(jnp.float32) / 127.5 - 1


def seen(method: Method, batch: Batch, stream: Callable[[str], Array],
         kept: Bool[Array, "clips"]) -> tuple[Latents, Condition]:
  """(clean latents, what is given) of a batch of clips, or of latents whose masks were drawn when they were encoded.

  stream: purpose -> a key for each sample. kept: False where nothing may be given.
  """
  codec = method.codec
  if "latents" in batch:
    stored = {name: batch[name].astype(jnp.float32) for name in ("latents", "known", "image") if name in batch}
    given = of_latents(batch["mask"], stored["known"], codec.temporal, stored.get("image"))
    return stored["latents"], given.replace(segment=batch.get("segment"))
  frames = unit(batch["frames"])
  mask = method.tasks(stream("task"), cells_touched(batch["character"], codec.spatial), codec.temporal)
  mask = mask & kept[:, None, None, None]
  return codec.encode(frames), condition(frames, mask, codec.encode, codec.temporal)


def lesson(method: Method, batch: Batch, step: Array | int, samples: Int[Array, "*b"],
           key: Callable[[str], Array]) -> Lesson:
  """Draws task, times and noise of each sample. key: of a purpose; samples: numbers in the whole batch, as "ok"."""
  def stream(purpose: str) -> Array:
    return keys.per_sample(key(purpose), samples.reshape(-1))

  laid = packed.layout(batch)
  drop = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(stream("drop"))
  text = batch["text"].astype(jnp.float32)
  text = jnp.where((drop[:, 1] >= method.drop_text).reshape(*samples.shape, 1, 1), text, method.blank)
  clean, given = seen(method, batch, stream, drop[:, 0] >= method.drop_condition)
  noise = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:]))(stream("noise"))
  t = method.times(stream("time"), clean.shape[1], step, laid and laid.lengths)
  if laid:
    noise, t = laid.frames(noise), laid.frames(t)
  ok = laid.clips(batch["ok"]) if laid else batch["ok"][:, None]
  share = jnp.where(given.frozen, method.given, 1.0)
  if method.given:
    given = given.told_by_mask_alone()
  return Lesson(clean=clean, noise=noise, t=share * t, share=share, given=given, text=text, ok=ok)


def errors(method: Method, params: PyTree, it: Lesson) -> tuple[Times, Bool[Array, "b f"]]:
  """Mean squared error of each frame's velocity, and which frames count: hidden ones of clips that could be read."""
  x = path.noisy(it.clean, it.noise, it.t)
  predicted = method.velocity(params, x, it.t, it.given, it.text)
  found = objective.frame_errors(predicted, path.velocity(it.clean, it.noise), ~it.given.held)
  return found, ~it.given.frozen & (it.ok > 0)


def sums(params: PyTree, method: Method, batch: Batch, step: Array, samples: Array) -> tuple[Scalar, Scalar]:
  """(weighted sum of errors, count) of one micro-batch."""
  it = lesson(method, batch, step, samples, lambda purpose: keys.key(method.seed, step, purpose))
  found, counted = errors(method, params, it)
  return objective.loss_sums(found, objective.weight(it.t, method.weight, method.times), counted)


def added(method: Method, params: PyTree, batch: Batch, step: Array) -> tuple[PyTree, Scalar, Scalar]:
  """(gradients of the sum, sum, count) of a batch, worked through in micro-batches that cut across all devices."""
  parts = method.micro_batches
  batch = {name: rearrange(x, "(b k) ... -> k b ...", k=parts) for name, x in batch.items()}
  slope = jax.value_and_grad(sums, has_aux=True)

  def add(carry, part):
    (total, count), grads = slope(params, method, part, step, part["samples"])
    return jax.tree.map(jnp.add, carry, (grads, total, count)), None

  if parts == 1:
    (total, count), grads = slope(params, method, {name: x[0] for name, x in batch.items()}, step, batch["samples"][0])
  else:
    zero = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()), jnp.zeros(()))
    (grads, total, count), _ = jax.lax.scan(add, zero, batch)
  return grads, total, count


def gradients(method: Method, params: PyTree, batch: Batch, step: Array) -> tuple[PyTree, Scalar]:
  """Gradients and loss of a whole batch."""
  batch = {**batch, "samples": jnp.arange(batch["ok"].size).reshape(batch["ok"].shape)}
  if method.replicas == 1:
    grads, total, count = added(method, params, batch, step)
  else:
    batch = {name: rearrange(x, "(r b) ... -> r b ...", r=method.replicas) for name, x in batch.items()}
    each = jax.vmap(partial(added, method, params, step=step), spmd_axis_name=meshes.REPLICA)
    grads, *rest = each(batch)
    grads, total, count = jax.tree.map(lambda x: x.sum(0), (method.shares(grads), *rest))
  count = jnp.maximum(count, 1.0)
  return jax.tree.map(lambda g: g / count, grads), total / count


def after(x: Array | np.ndarray, known: Scalar) -> Array:
  """x, which is 0 or more, in a form that has to wait until `known` is.

  On simulated devices a collective that does not depend on a loop may overtake the collectives inside, on some devices
  and not on others, and all wait forever (jax 0.10.2). So what a step only counts, it counts after its gradients.
  """
  return jnp.maximum(x, -jnp.isnan(known).astype(x.dtype))


def make_step(method: Method, optimizer: optax.GradientTransformation,
              average: Callable[[PyTree, PyTree, Array], PyTree],
              fetch: Callable[..., TrainState] = lambda state, known: state
              ) -> Callable[..., tuple[TrainState, Measures]]:
  """(state, batch, frozen) -> (state, measures): the step of plain training, or of adapters beside a frozen base.

  average: (ema, params, step) -> ema. fetch: (state, known) -> the state where it can be computed with, once `known`
  is. A step that is not finite changes nothing.
  """
  def step(state: TrainState, batch: Batch, frozen: Frozen | None = None) -> tuple[TrainState, Measures]:
    told = {name: x for name, x in batch.items() if name != "stop"}
    grads, loss = gradients(bind(method, frozen), state.params, told, state.step)
    norm = optax.tree.norm(grads)
    stop = after(batch["stop"], norm).max()
    unread = (after(batch["ok"], norm) == 0).sum(dtype=jnp.float32)  # a float, for these are shown
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & (stop >= 0) & (unread >= 0)  # the last two always hold

    state = fetch(state, known=norm)

    def update(state: TrainState) -> TrainState:
      changes, opt = optimizer.update(grads, state.opt, state.params)
      params = optax.apply_updates(state.params, changes)
      return state.replace(params=params, opt=opt, ema=average(state.ema, params, state.step))

    # Chosen leaf by leaf, for branches would each need a state of their own beside the donated one.
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), update(state), state)
    measures = {"loss": loss, "grad_norm": norm, "skipped": ~finite, "unread": unread, "stop": stop}
    return state.replace(step=state.step + 1), measures

  return step


BINS = 5  # noise-time bins of the held-out loss


def make_held_out(method: Method) -> Callable[..., Float[Array, "bins"]]:
  """(params, batch, number of the batch, frozen) -> loss in each bin of noise time, all frames at the bin's middle.

  Tasks, noise and times are the same at every call, so that the curve moves only with the model.
  """
  def held_out(params: PyTree, batch: Batch, number: Array, frozen: Frozen | None = None) -> Float[Array, "bins"]:
    stream, bound = keys.key(method.seed, number, "heldout"), bind(method, frozen)
    it = lesson(bound, batch, 0, jnp.arange(batch["ok"].size).reshape(batch["ok"].shape),
                lambda purpose: jax.random.fold_in(stream, keys.PURPOSES[purpose]))

    def at(t: Scalar) -> Scalar:
      found, counted = errors(bound, params, it.replace(t=t * it.share))
      total, count = objective.loss_sums(found, jnp.ones_like(found), counted)
      return total / jnp.maximum(count, 1.0)

    return jax.lax.map(at, (jnp.arange(BINS) + 0.5) / BINS)

  return held_out
