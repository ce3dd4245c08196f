"""The one entry to attention: q, k, v in, output out, by the name of a pattern and of a local kernel.

A pattern says which tokens meet and how shards talk; a kernel works one block on one device.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from anisora_jax.errors import BadInput, pick
from anisora_jax.models.kernels import LOCAL, Local
from anisora_jax.parallel.mesh import BATCH
from anisora_jax.parallel.ring import ring
from anisora_jax.shapes import Heads, Segments


def check(pattern: str, kernel: str, mesh: Mesh, heads: int, dtype: str, ids: bool = False,
          trains: bool = True) -> None:
  """Refuses, before anything is compiled, a pattern or kernel that cannot run here, and names the kernels that can.

  ids: whether some tokens do not see all others. trains: whether gradients are asked for. Raises BadInput.
  """
  pick(PATTERNS, pattern, "attention pattern")
  pick(LOCAL, kernel, "attention kernel")
  if heads % mesh.shape["tensor"]:
    raise BadInput(f"{heads} heads do not divide by mesh axis tensor = {mesh.shape['tensor']}: choose a divisor.")
  if mesh.shape["seq"] > 1 and pattern == "full":
    raise BadInput(f"pattern 'full' needs mesh axis seq = 1, got {mesh.shape['seq']}: use 'ring'.")
  platform, seq, asked = mesh.devices.flat[0].platform, mesh.shape["seq"], LOCAL[kernel]
  needs = [  # (what the kernel says where it cannot, whether a kernel can)
    (f"needs a {(asked.platform or '').upper()}, here is a {platform}", lambda x: x.platform in (None, platform)),
    (f"works in {' or '.join(asked.dtypes)}, not in {dtype}", lambda x: dtype in x.dtypes),
    (f"returns no log-sum-exp, which a ring over seq = {seq} needs", lambda x: x.block is not None or seq == 1),
    ("takes no segment ids or padding", lambda x: x.ids or not ids),
    ("has no backward pass", lambda x: x.trains or not trains)]
  able = [name for name, local in LOCAL.items() if all(can(local) for _, can in needs)]
  for lack, can in needs:
    if not can(asked):
      raise BadInput(f"kernel {kernel!r} {lack}: use one of {', '.join(able)}.")


def _over_shards(body: Callable, mesh: Mesh, kernel: Local, q: Heads, k: Heads, v: Heads, segments: Segments | None):
  """Runs `body` on each device's tokens, frames flattened: attention does not care about the order of tokens."""
  def flat(q, k, v, ids):
    shape = q.shape
    q, k, v = (x.reshape(shape[0], -1, *shape[-2:]) for x in (q, k, v))
    return body(q, k, v, None if ids is None else ids.reshape(shape[0], -1)).reshape(shape)

  heads, ids = P(BATCH, None, "seq", "tensor", None), P(BATCH, None, "seq")
  return jax.shard_map(flat, mesh=mesh, in_specs=(heads, heads, heads, ids), out_specs=heads,
                       check_vma=kernel.typed)(q, k, v, segments)


def full(q: Heads, k: Heads, v: Heads, segments: Segments | None, mesh: Mesh, kernel: str) -> Heads:
  """Every token sees every token of its clip; all tokens on one device."""
  local = LOCAL[kernel]

  def body(q, k, v, ids):
    return local.attend(q, k, v, None if ids is None else (ids, ids))

  return _over_shards(body, mesh, local, q, k, v, segments)


def ringed(q: Heads, k: Heads, v: Heads, segments: Segments | None, mesh: Mesh, kernel: str) -> Heads:
  """Every token sees every token of its clip; tokens split over the mesh axis seq."""
  if mesh.shape["seq"] == 1:
    return full(q, k, v, segments, mesh, kernel)
  local = LOCAL[kernel]
  return _over_shards(partial(ring, axis="seq", kernel=local.block), mesh, local, q, k, v, segments)


def to_text(q: Heads, k: Float[Array, "b s a k"], v: Float[Array, "b s a k"], mesh: Mesh, kernel: str) -> Heads:
  """Cross-attention: every video token sees every text token. Text is whole on every shard, so nothing is sent."""
  local = LOCAL[kernel]

  def flat(q, k, v):
    k, v = (lax.pcast(x, "seq", to="varying") for x in (k, v))  # their gradients are summed over the shards
    return local.attend(q.reshape(q.shape[0], -1, *q.shape[-2:]), k, v, None).reshape(q.shape)

  heads, words = P(BATCH, None, "seq", "tensor", None), P(BATCH, None, "tensor", None)
  return jax.shard_map(flat, mesh=mesh, in_specs=(heads, words, words), out_specs=heads,
                       check_vma=local.typed)(q, k, v)


PATTERNS = {"full": full, "ring": ringed}  # name in configs -> function
