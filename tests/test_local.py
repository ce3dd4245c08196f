"""Local and global attention over a film that is split by frames: one softmax, whose keys come once and from near."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import apart
from jax.sharding import PartitionSpec as P
from overtake import overtaking
from plain import sends, softmax
from schemes import assert_softmax, attend, on

from anisora_jax.errors import BadInput
from anisora_jax.models import attention, kernels
from anisora_jax.models.attention import PATTERNS
from anisora_jax.models.wan.dit import WanDiT
from anisora_jax.models.wan.placement import RULES
from anisora_jax.models.wan.sizes import SIZES, Size
from anisora_jax.parallel import placement
from anisora_jax.parallel.halo import halo
from anisora_jax.parallel.sight import Rule

HEADS, WIDTH = 2, 4


def scope(window: int, globals_: set[int], frames: int, causal: bool = False) -> np.ndarray:
  """[f, f]: which frames each frame sees."""
  return np.array([[(abs(i - j) <= window or j in globals_) and not (causal and j > i) for j in range(frames)]
                   for i in range(frames)])


# Windows within a share of the frames, over several, and beyond the film; globals on every device, on some, and none.
CASES = {
  "within": (Rule(window=1, stride=2), scope(1, {0, 2, 4, 6}, 8)),
  "over": (Rule(window=3, stride=5), scope(3, {0, 5}, 8)),
  "beyond": (Rule(window=20, stride=3), scope(20, set(), 8)),
  "local": (Rule(window=2), scope(2, set(), 8)),
  "global": (Rule(window=0, stride=3), scope(0, {0, 3, 6}, 8)),
  "causal": (Rule(causal=True, window=1, stride=4), scope(1, {0, 4}, 8, True)),
}


@pytest.mark.parametrize(("clip", "seq", "kernel", "names"), [
  (2, 1, "blockwise", ("within", "over")), (4, 1, "dense", ("over", "causal")), (8, 1, "blockwise", ("over", "beyond")),
  (1, 4, "dense", ("within", "local")), (2, 2, "dense", ("global", "causal")),
  (4, 2, "blockwise", ("within", "causal")), (2, 4, "blockwise", ("local", "global")),
  (1, 8, "dense", ("global", "beyond"))])
def test_what_is_near_and_what_all_see_is_one_softmax(clip, seq, kernel, names, monkeypatch):
  """Values and gradients. Two clips: one padded in frames and tokens as the network pads, one packed of segments."""
  monkeypatch.setitem(kernels.SIDE, "cpu", 20)
  there, draw = on(clip, seq), np.random.default_rng(clip)
  ids = draw.integers(-1, 2, (2, 8, 9 + -9 % seq)).astype(np.int32)
  ids[:, :, 9:], ids[0, :7, :9], ids[0, 7] = -1, 0, -1
  arrays = tuple(draw.normal(size=(*ids.shape, HEADS, WIDTH)).astype(np.float32) for _ in range(4))
  chosen = [(arrays, ids, rule, softmax(*arrays, ids, seen)) for rule, seen in map(CASES.get, names)]
  assert overtaking(assert_softmax("local_global", there, kernel, chosen)) == []


@pytest.mark.parametrize("name", list(CASES))
def test_no_gradient_reaches_frames_out_of_scope(name):
  """The gradient of each frame with respect to each is exactly zero outside of the scope, and not within."""
  rule, seen = CASES[name]
  there, draw = on(4, 2), np.random.default_rng(0)
  q, k, v = (jnp.asarray(draw.normal(size=(1, 8, 2, HEADS, WIDTH)), jnp.float32) for _ in range(3))

  @jax.jit
  def influence(q, k, v):
    _, back = jax.vjp(lambda *kv: PATTERNS["local_global"](q, *kv, None, there, "dense", rule), k, v)
    cotangents = jnp.eye(8)[:, None, :, None, None, None] * q[None]
    found = jax.lax.map(back, cotangents)
    return [jnp.abs(x).max((1, 3, 4, 5)) for x in found]

  for found in influence(q, k, v):
    assert (np.asarray(found)[~seen] == 0).all() and (np.asarray(found)[seen] > 0).all()


@pytest.mark.parametrize(("devices", "before", "after"), [(2, 1, 0), (4, 2, 2), (4, 3, 5), (8, 2, 7), (4, 9, 20)])
def test_a_halo_is_what_lies_beside_a_share(devices, before, after):
  """Of films of two frames a device; so is its gradient, of which every copy of a frame has a part."""
  there = on(devices, 1)
  x = jnp.arange(1.0, 1 + 6 * devices).reshape(3, 2 * devices)
  wide = jax.shard_map(partial(halo, before=before, after=after, axis="clip", dim=1), mesh=there,
                       in_specs=P(None, "clip"), out_specs=P(None, "clip"))

  def plain(x):
    padded = jnp.pad(x, ((0, 0), (before, after)))
    return jnp.concatenate([padded[:, 2 * at:2 * at + before + 2 + after] for at in range(devices)], 1)

  draw = np.random.default_rng(0)
  (made, back), (true, true_back) = (jax.vjp(jax.jit(f), x) for f in (wide, plain))
  do = jnp.asarray(draw.normal(size=true.shape), jnp.float32)
  assert (made == true).all() and apart(back(do)[0], true_back(do)[0]) < 1e-6


def halved(f: int, devices: int, count: int) -> int:
  """Frames that all devices together send to one side, for halos of so many."""
  return sum((devices - hop) * max(0, min(f, count - (hop - 1) * f)) for hop in range(1, devices))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("clip", "seq", "window", "stride", "causal"), [
  (8, 1, 1, 4, False), (4, 1, 5, None, False), (4, 2, 2, 3, False), (2, 4, 3, 4, True), (2, 1, 30, 2, False)])
def test_what_is_sent_is_what_the_formulas_say(clip, seq, window, stride, causal, dtype):
  """Halos and frames for all, then what a frame's devices send, forward and backward; counted in the traced program."""
  f, size, rule = 4, jnp.dtype(dtype).itemsize, Rule(causal, window, stride)
  array = jax.ShapeDtypeStruct((1, f * clip, 8, HEADS, WIDTH), dtype)
  there = on(clip, seq)
  found, ring = (sends(jax.make_jaxpr(partial(attend, pattern, there, "dense", ids=None, rule=rule))([array] * 4).jaxpr)
                 for pattern in ("local_global", "ring"))
  frame, window = 8 // seq * HEADS * WIDTH, min(window, (clip - 1) * f)
  spread, sides = -(-f // stride) if stride else 0, 1 if causal else 2
  assert found["gathered"] == 2 * 2 * frame * size * spread * (clip - 1)
  wide, together = f + sides * window + (clip * spread if clip > 1 else 0), min(seq, HEADS)
  assert found["exchanged"] == 2 * 2 * frame * (f + wide) * size * (together - 1) // together
  r, halos = seq // together, 2 * 2 * frame * size * sides * halved(f, clip, window)
  turns = seq * 2 * frame * wide * (2 * (r - 1) * size + (r - 2) * 4 + size) if r > 1 else 0
  line = sum(bytes_ for link, bytes_ in found.items() if isinstance(link, tuple))  # of one line of devices an axis
  assert line == halos + turns
  if clip == 8:  # a short window of a long film
    assert line + clip * found["gathered"] < sum(ring.values()) / 4


def learned(there, mask: str, pattern: str):
  """((loss, gradients) of a clip of 7 frames of 15 tokens, the compiled program)."""
  size = Size(layers=2, width=16, heads=2, mlp=32, channels=4, given=0, text_width=16, text_tokens=6, image_width=0,
              waves=32)
  net, draw = WanDiT(size, there, pattern, mask=mask), np.random.default_rng(0)
  x, target, t, text = (jnp.asarray(array, jnp.float32) for array in (
    *draw.normal(size=(2, 1, 7, 6, 10, 4)), draw.uniform(size=(1, 7)), draw.normal(size=(1, 5, 16))))
  params = jax.eval_shape(net.init, jax.random.key(0), x, t, text)["params"]
  params = jax.tree.map(lambda x: draw.normal(size=x.shape, scale=x.shape[-2] ** -0.5 if x.ndim > 1 else 0.5)
                        .astype(np.float32), params)

  def loss(params):
    return jnp.square(net.apply({"params": params}, x, t, text) - target).mean()

  placed = placement.shardings(RULES, params, there)
  run = jax.jit(jax.value_and_grad(loss), in_shardings=(placed,), out_shardings=(None, placed))
  run = run.lower(params).compile()
  return run(jax.device_put(params, placed)), run.as_text()


def test_the_network_learns_the_same_of_a_film_in_parts():
  """Frames and tokens of frames are split and padded; of all frames the network sees those that the mask shows."""
  mask = "window:1+globals:2"
  (all_seen, _), (one, _), (parts, hlo) = (learned(*how) for how in (
    (on(1, 1), "all", "full"), (on(1, 1), mask, "full"), (on(4, 2), mask, "local_global")))
  worst = jax.tree.map(apart, parts, one)
  assert max(jax.tree.leaves(worst)) < 1e-4 and worst[0] < 1e-5, worst
  assert abs(all_seen[0] - one[0]) > 1e-3 * one[0]
  assert overtaking(hlo) == []


def test_a_pattern_without_a_window_is_refused_in_one_line():
  words = ("pattern 'local_global' needs a window of frames: give mask 'window:24' or 'window:24+globals:24', or use "
           "'ring'.")
  for rule in (None, Rule(causal=True)):
    with pytest.raises(BadInput, match=re.escape(words)):
      attention.check("local_global", "dense", on(2, 1), 4, "float32", rule)
  attention.check("local_global", "dense", on(2, 1), 4, "float32", Rule(window=1))


def test_what_is_not_seen_is_not_counted():
  """Of 4 frames of 10 tokens: 4 width operations a layer for each pair of tokens, of which a rule leaves a share."""
  size = SIZES["tiny"]
  pairs, text = 10 * 10 * int(scope(1, {0}, 4).sum()), 40 * size.text_tokens
  share = Rule(window=1, stride=4).share(4)
  assert size.attention_flops(4, 10, seen=share) == 4 * size.layers * size.width * (pairs + text)
  less = size.forward_flops(4, 10) - size.forward_flops(4, 10, seen=share)
  assert less == 4 * size.layers * size.width * (1600 - pairs)
