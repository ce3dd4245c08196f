"""The one entry to attention: q, k, v in, output out, by the name of a pattern and of a local kernel.

A pattern says which tokens meet and how shards talk; a kernel works one block on one device.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from anisora_jax.errors import BadInput, pick
from anisora_jax.models.kernels import LOCAL, Local
from anisora_jax.parallel.halo import near
from anisora_jax.parallel.mesh import BATCH, CLIP, REPLICA
from anisora_jax.parallel.ring import AllIds, Route, ring
from anisora_jax.parallel.sight import ALL, Marks, Rule
from anisora_jax.parallel.ulysses import ulysses
from anisora_jax.shapes import Heads, Segments

STRAIGHT = ("cpu",)  # platforms on which rings are no loops, see `Route`
# The name of what cross-attention gives, which no policy keeps: its few keys are soon worked again, and over the layers
# of a long clip it is as large as what self-attention gives.
TO_TEXT = "attention to text"


def check(pattern: str, kernel: str, mesh: Mesh, heads: int, dtype: str, rule: Rule | None = None,
          trains: bool = True) -> None:
  """Refuses, before anything is compiled, a pattern or kernel that cannot run here, and names the kernels that can.

  rule: what hides tokens from each other; None where nothing does. trains: whether gradients are asked for. Raises
  BadInput.
  """
  scheme = pick(PATTERNS, pattern, "attention pattern")
  asked = pick(LOCAL, kernel, "attention kernel")
  if heads % mesh.shape["tensor"]:
    raise BadInput(f"{heads} heads do not divide by mesh axis tensor = {mesh.shape['tensor']}: choose a divisor.")
  shards, together = scheme.split(mesh, heads)
  if shards > 1 and pattern == "full":
    others = ", ".join(repr(name) for name, other in PATTERNS.items() if name != pattern and not other.nearby)
    raise BadInput(f"pattern 'full' needs mesh axes clip x seq = 1, got {shards}: use {others}.")
  if scheme.nearby and (rule is None or rule.window is None):
    raise BadInput(f"pattern {pattern!r} needs a window of frames: give mask 'window:24' or 'window:24+globals:24', or "
                   "use 'ring'.")
  own = heads // mesh.shape["tensor"]
  if own % together:
    raise BadInput(f"pattern {pattern!r} needs the heads of a device to divide by clip x seq = {shards}, got {own} "
                   f"({heads} over tensor = {mesh.shape['tensor']}): use 'hybrid' or 'ring'.")
  platform = mesh.devices.flat[0].platform
  capability = _capability(mesh)
  needs = [  # (what the kernel says where it cannot, whether a kernel can)
    (f"needs a {(asked.platform or '').upper()}, here is a {platform}", lambda x: x.platform in (None, platform)),
    (f"needs an NVIDIA card of compute capability {asked.capability:g} or more", lambda x: x.capability <= capability),
    (f"works in {' or '.join(asked.dtypes)}, not in {dtype}", lambda x: dtype in x.dtypes),
    (f"returns no log-sum-exp, which a ring of {shards // together} needs",
     lambda x: x.block is not None or shards == together),
    ("takes no rows that clips share", lambda x: x.packed or rule is None or not rule.packed),
    ("hides no frames from each other", lambda x: x.frames or not rule),
    ("has no backward pass", lambda x: x.trains or not trains)]
  able = [name for name, local in LOCAL.items() if all(can(local) for _, can in needs)]
  for lack, can in needs:
    if not can(asked):
      raise BadInput(f"kernel {kernel!r} {lack}: use one of {', '.join(able)}.")


class Pattern(NamedTuple):
  """Tokens see what their rule lets them see; those of a clip are split over the mesh axes clip and seq.

  together: (devices of the axes, heads of a device) -> how many neighbours exchange heads for tokens, as `ulysses`
  says; rings join what is left. both: whether keys travel both ways round a ring. nearby: devices that hold other
  frames send only those that a rule with a window lets be seen, as `halo` says; then the axis is seq.
  """

  together: Callable[[int, int], int]
  both: bool = False
  nearby: bool = False

  @property
  def axes(self) -> tuple[str, ...]:
    """Over which keys go round or heads are exchanged."""
    return ("seq",) if self.nearby else CLIP

  @property
  def transfers(self) -> int:
    """Arrays that a device sends in a turn of a ring: keys, values and their gradients, or the halves of each."""
    return 8 if self.both else 4

  def split(self, mesh: Mesh, heads: int) -> tuple[int, int]:
    """(devices of the axes, how many of them exchange heads)."""
    devices = math.prod(mesh.shape[axis] for axis in self.axes)
    return devices, self.together(devices, heads // mesh.shape["tensor"])

  def __call__(self, q: Heads, k: Heads, v: Heads, segments: Segments | None, mesh: Mesh, kernel: str,
               rule: Rule = ALL) -> Heads:
    (devices, together), local = self.split(mesh, q.shape[-2]), LOCAL[kernel]
    inner = partial(_alone, kernel=local)
    if together < devices:
      straight = mesh.devices.flat[0].platform in STRAIGHT
      inner = partial(ring, route=Route(self.axes, together, self.both, straight), kernel=local.block)
    if together > 1:
      inner = partial(ulysses, axes=self.axes, together=together, inner=inner)

    def flat(q, k, v, segments):
      marks = partial(_marks, segments, seq=mesh.shape["seq"], rule=rule)
      f, shape = q.shape[1], q.shape
      if self.nearby:
        k, v, frames = near(k, v, rule, "clip")
        ids = marks(lax.axis_index("clip") * f + jnp.arange(f)[None]), marks(frames[None])
      else:
        ids = None if segments is None else (marks(jnp.arange(segments.shape[1]).reshape(-1, f)),) * 2
      q, k, v = (x.reshape(shape[0], -1, *shape[-2:]) for x in (q, k, v))  # attention does not care about the order
      return inner(q, k, v, ids).reshape(shape)

    if rule and segments is None:
      segments = jnp.zeros(q.shape[:3], jnp.int32)
    heads = P(BATCH, *CLIP, "tensor", None)
    return jax.shard_map(flat, mesh=mesh, in_specs=(heads, heads, heads, P(BATCH)), out_specs=heads,
                         check_vma=_typed(local, mesh))(q, k, v, segments)


def _capability(mesh: Mesh) -> float:
  """Of a card; 0 of one that is not NVIDIA's, infinite where nothing tells."""
  told = getattr(mesh.devices.flat[0], "compute_capability", None)
  if not isinstance(told, str):
    return math.inf
  return float(told) if re.fullmatch(r"\d+(\.\d+)?", told) else 0.0


def _typed(kernel: Local, mesh: Mesh) -> bool:
  """Whether types tell what varies over which axes: not that a step works replica by replica, which `vmap` adds."""
  return kernel.typed and mesh.shape[REPLICA] == 1


def _alone(q: Array, k: Array, v: Array, ids: AllIds, kernel: Local) -> Array:
  """All tokens are here."""
  return kernel.attend(q, k, v, jax.tree.map(lambda x: x[0], ids))


def _marks(segments: Segments, frames: Int[Array, "c _"], seq: int, rule: Rule) -> Marks:
  """The marks of the tokens of devices [c seq, b, f n] that keep these frames of a film, negative ones of none.

  They weigh little, and need not be sent where all are known.
  """
  def share(x):
    return rearrange(x, "b c f (r n) -> (c r) b (f n)", r=seq)

  segments = jnp.where(frames[..., None] < 0, -1, jnp.take(segments, frames, 1, mode="clip"))
  frames = jnp.broadcast_to(frames[..., None], segments.shape)
  return Marks(share(segments), share(frames) if rule else None, rule)


def to_text(q: Heads, k: Float[Array, "b s a k"], v: Float[Array, "b s a k"], mesh: Mesh, kernel: str,
            ids: tuple[Segments, Int[Array, "b s"]] | None = None) -> Heads:
  """Cross-attention: every video token sees every text token, or, by ids of both, that of its own clip.

  Text is whole on every shard, so nothing is sent.
  """
  local = LOCAL[kernel]

  def flat(q, k, v, ids):
    k, v = (lax.pcast(x, CLIP, to="varying") for x in (k, v))  # their gradients are summed over the shards
    if ids is not None:
      ids = Marks(ids[0].reshape(len(q), -1)), Marks(lax.pcast(ids[1], CLIP, to="varying"))
    return local.attend(q.reshape(q.shape[0], -1, *q.shape[-2:]), k, v, ids, TO_TEXT).reshape(q.shape)

  heads, words = P(BATCH, *CLIP, "tensor", None), P(BATCH, None, "tensor", None)
  of_ids = None if ids is None else (P(BATCH, *CLIP), P(BATCH))
  return jax.shard_map(flat, mesh=mesh, in_specs=(heads, words, words, of_ids), out_specs=heads,
                       check_vma=_typed(local, mesh))(q, k, v, ids)


PATTERNS = {  # name in configs -> function
  "full": Pattern(lambda seq, heads: 1),
  "ring": Pattern(lambda seq, heads: 1),
  "ring_both": Pattern(lambda seq, heads: 1, both=True),
  "ulysses": Pattern(lambda seq, heads: seq),
  "hybrid": Pattern(math.gcd),  # as many exchange as heads divide by, since an exchange sends less than a ring
  "local_global": Pattern(math.gcd, nearby=True),
}
