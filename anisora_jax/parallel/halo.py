"""Frames that a device needs of others where a mesh axis splits a film by frames: its neighbours', and some of all.

With f frames on each of c devices, a window of w frames to each side and every s-th frame of the film for all, a device
that has w frames on both sides sends 2 w frames of keys and of values (w of a causal rule), and ceil(f / s) frames to
each of the c - 1 others; backward as many frames of their gradients come back, in the same type. A ring sends (c - 1) f
frames of both; backward these again, and as many of gradients, in f32 but for the last f. So halos pay in sampling
while 2 w + (c - 1) ceil(f / s) < (c - 1) f, and in training while it is less than 3/2 of that, in bf16 nearly twice.
From: the dual scope attention of Video-Infinity, Tan et al. 2024, arXiv:2406.16260; unlike theirs, frames past the ends
of the film are not seen, and those seen both ways count once.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from anisora_jax.parallel.sight import Rule


def halo(x: Array, before: int, after: int, axis: str, dim: int) -> Array:
  """x, and along dim so much of what neighbours hold before and after it, zeros past the ends; inside shard_map.

  What reaches beyond the next neighbour comes straight from those behind it. Its gradient is sent back and added up.
  """
  devices, length = lax.axis_size(axis), x.shape[dim]

  def side(count: int, way: int) -> list[Array]:
    """From the nearest on."""
    parts = []
    for hop in range(1, devices):
      some = min(length, count - (hop - 1) * length)
      if some > 0:
        near = lax.slice_in_dim(x, length - some if way > 0 else 0, length if way > 0 else some, axis=dim)
        to = [(i, i + way * hop) for i in range(devices) if 0 <= i + way * hop < devices]
        parts.append(lax.ppermute(near, axis, to))
    spare = count - sum(part.shape[dim] for part in parts)
    return [*parts, jnp.repeat(jnp.zeros_like(lax.slice_in_dim(x, 0, 1, axis=dim)), spare, dim)] if spare else parts

  return jnp.concatenate([*side(before, 1)[::-1], x, *side(after, -1)], dim)


def reach(rule: Rule, f: int, devices: int) -> tuple[int, int, int]:
  """(frames before those of a device, after them, of all devices for all) that `near` gives, of f on each device."""
  before = min(rule.window, (devices - 1) * f)
  shared = 0 if rule.stride is None or devices == 1 else devices * -(-f // rule.stride)
  return before, 0 if rule.causal else before, shared


def near(k: Float[Array, "b f n a k"], v: Float[Array, "b f n a k"], rule: Rule,
         axis: str) -> tuple[Array, Array, Int[Array, "_"]]:
  """Keys and values of all frames that a rule with a window shows to the frames of this device; inside shard_map.

  Last their numbers in the film, -1 for what is not there or there already: no number comes twice.
  """
  f, devices, at = k.shape[1], lax.axis_size(axis), lax.axis_index(axis)
  before, after, shared = reach(rule, f, devices)
  first, last = at * f - before, at * f + f + after
  frames = first + jnp.arange(before + f + after)
  frames = jnp.where((frames >= 0) & (frames < devices * f), frames, -1)
  wide = [halo(x, before, after, axis, 1) for x in (k, v)]
  if not shared:
    return *wide, frames
  starts = f * jnp.arange(devices)[:, None]
  chosen = -starts % rule.stride + rule.stride * jnp.arange(-(-f // rule.stride))  # of each device's, those all see
  spread = jnp.where(chosen < f, starts + chosen, -1).reshape(-1)
  spread = jnp.where((spread < first) | (spread >= last), spread, -1)
  given = [lax.all_gather(jnp.take(x, chosen[at], 1, mode="clip"), axis, axis=1, tiled=True) for x in (k, v)]
  return *(jnp.concatenate(parts, 1) for parts in zip(wide, given, strict=True)), jnp.concatenate([frames, spread])
