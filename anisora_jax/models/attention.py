"""The one entry to attention: q, k, v in, output out, by the name of a pattern and of a local kernel.

A pattern says which tokens meet and how shards talk; a kernel works one block on one device.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from einops import rearrange
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from anisora_jax.errors import BadInput, pick
from anisora_jax.models.kernels import LOCAL, Local
from anisora_jax.parallel.mesh import BATCH, CLIP, clip_shards
from anisora_jax.parallel.ring import AllIds, Route, ring
from anisora_jax.parallel.ulysses import ulysses
from anisora_jax.shapes import Heads, Segments

STRAIGHT = ("cpu",)  # platforms on which rings are no loops, see `Route`
# The name of what cross-attention gives, which no policy keeps: its few keys are soon worked again, and over the layers
# of a long clip it is as large as what self-attention gives.
TO_TEXT = "attention to text"


def check(pattern: str, kernel: str, mesh: Mesh, heads: int, dtype: str, ids: bool = False,
          trains: bool = True) -> None:
  """Refuses, before anything is compiled, a pattern or kernel that cannot run here, and names the kernels that can.

  ids: whether some tokens do not see all others. trains: whether gradients are asked for. Raises BadInput.
  """
  scheme = pick(PATTERNS, pattern, "attention pattern")
  asked = pick(LOCAL, kernel, "attention kernel")
  if heads % mesh.shape["tensor"]:
    raise BadInput(f"{heads} heads do not divide by mesh axis tensor = {mesh.shape['tensor']}: choose a divisor.")
  shards, own = clip_shards(mesh), heads // mesh.shape["tensor"]
  if shards > 1 and pattern == "full":
    others = ", ".join(repr(name) for name in PATTERNS if name != pattern)
    raise BadInput(f"pattern 'full' needs mesh axes clip x seq = 1, got {shards}: use {others}.")
  together = scheme.together(shards, own)
  if own % together:
    raise BadInput(f"pattern {pattern!r} needs the heads of a device to divide by clip x seq = {shards}, got {own} "
                   f"({heads} over tensor = {mesh.shape['tensor']}): use 'hybrid' or 'ring'.")
  platform = mesh.devices.flat[0].platform
  needs = [  # (what the kernel says where it cannot, whether a kernel can)
    (f"needs a {(asked.platform or '').upper()}, here is a {platform}", lambda x: x.platform in (None, platform)),
    (f"works in {' or '.join(asked.dtypes)}, not in {dtype}", lambda x: dtype in x.dtypes),
    (f"returns no log-sum-exp, which a ring of {shards // together} needs",
     lambda x: x.block is not None or shards == together),
    ("takes no segment ids or padding", lambda x: x.ids or not ids),
    ("has no backward pass", lambda x: x.trains or not trains)]
  able = [name for name, local in LOCAL.items() if all(can(local) for _, can in needs)]
  for lack, can in needs:
    if not can(asked):
      raise BadInput(f"kernel {kernel!r} {lack}: use one of {', '.join(able)}.")


class Pattern(NamedTuple):
  """Every token sees every token of its clip; tokens split over the mesh axes clip and seq.

  together: (devices that share a clip, heads of a device) -> how many neighbours exchange heads for tokens, as
  `ulysses` says; rings join what is left. both: whether keys travel both ways round a ring.
  """

  together: Callable[[int, int], int]
  both: bool = False

  def __call__(self, q: Heads, k: Heads, v: Heads, segments: Segments | None, mesh: Mesh, kernel: str) -> Heads:
    shards, local = clip_shards(mesh), LOCAL[kernel]
    together = self.together(shards, q.shape[-2] // mesh.shape["tensor"])
    inner = partial(_alone, kernel=local)
    if together < shards:
      straight = mesh.devices.flat[0].platform in STRAIGHT
      inner = partial(ring, route=Route(CLIP, together, self.both, straight), kernel=local.block)
    if together > 1:
      inner = partial(ulysses, axes=CLIP, together=together, inner=inner)
    return _over_shards(inner, mesh, local, q, k, v, segments)


def _alone(q: Array, k: Array, v: Array, ids: AllIds, kernel: Local) -> Array:
  """All tokens are here."""
  return kernel.attend(q, k, v, None if ids is None else (ids[0], ids[0]))


def _over_shards(body: Callable, mesh: Mesh, kernel: Local, q: Heads, k: Heads, v: Heads, segments: Segments | None):
  """Runs `body` on each device's tokens, frames flattened: attention does not care about the order of tokens.

  It gets the segments of all tokens, [clip seq, b, l]: they weigh little, and need not be sent where all are known.
  """
  def flat(q, k, v, ids):
    shape = q.shape
    return body(*(x.reshape(shape[0], -1, *shape[-2:]) for x in (q, k, v)), ids).reshape(shape)

  if segments is not None:
    segments = rearrange(segments, "b (c f) (r n) -> (c r) b (f n)", c=mesh.shape["clip"], r=mesh.shape["seq"])
  heads = P(BATCH, *CLIP, "tensor", None)
  return jax.shard_map(flat, mesh=mesh, in_specs=(heads, heads, heads, P(None, BATCH)), out_specs=heads,
                       check_vma=kernel.typed)(q, k, v, segments)


def to_text(q: Heads, k: Float[Array, "b s a k"], v: Float[Array, "b s a k"], mesh: Mesh, kernel: str,
            ids: tuple[Segments, Int[Array, "b s"]] | None = None) -> Heads:
  """Cross-attention: every video token sees every text token, or, by ids of both, that of its own clip.

  Text is whole on every shard, so nothing is sent.
  """
  local = LOCAL[kernel]

  def flat(q, k, v, ids):
    k, v = (lax.pcast(x, CLIP, to="varying") for x in (k, v))  # their gradients are summed over the shards
    if ids is not None:
      ids = ids[0].reshape(len(q), -1), lax.pcast(ids[1], CLIP, to="varying")
    return local.attend(q.reshape(q.shape[0], -1, *q.shape[-2:]), k, v, ids, TO_TEXT).reshape(q.shape)

  heads, words = P(BATCH, *CLIP, "tensor", None), P(BATCH, None, "tensor", None)
  of_ids = None if ids is None else (P(BATCH, *CLIP), P(BATCH))
  return jax.shard_map(flat, mesh=mesh, in_specs=(heads, words, words, of_ids), out_specs=heads,
                       check_vma=local.typed)(q, k, v, ids)


PATTERNS = {  # name in configs -> function
  "full": Pattern(lambda seq, heads: 1),
  "ring": Pattern(lambda seq, heads: 1),
  "ring_both": Pattern(lambda seq, heads: 1, both=True),
  "ulysses": Pattern(lambda seq, heads: seq),
  "hybrid": Pattern(math.gcd),  # as many exchange as heads divide by, since an exchange sends less than a ring
}
