"""Every local attention kernel is one softmax, keeps what it promises to keep, and is refused where it cannot run.

The witness is torch in f64. Pallas's kernel runs interpreted, NVIDIA's call is stood in for.
"""

import re
from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from card import stand_in
from compare import apart
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from anisora_jax.errors import BadInput
from anisora_jax.models import attention, kernels, splash
from anisora_jax.models.kernels import LOCAL
from anisora_jax.models.remat import REMAT
from anisora_jax.parallel import mesh
from anisora_jax.parallel.ring import Route, ring
from anisora_jax.parallel.sight import ALL, PADDED, Marks, Rule

BLOCKS = [name for name, local in LOCAL.items() if local.block]
RULES = {  # which of four frames each sees
  Rule(causal=True): "1000 1100 1110 1111",
  Rule(window=1): "1100 1110 0111 0011",
  Rule(causal=True, window=1, stride=3): "1000 1100 1110 1011",
}


def takes(name: str, rule: Rule | None) -> bool:
  local = LOCAL[name]
  return rule is None or ((local.packed or not rule.packed) and (local.frames or not rule))


TAKEN = [pair for pair in product(BLOCKS, (None, PADDED, ALL, *RULES)) if takes(*pair)]  # kernels, and rules they take
SIDES = [(1, 1), (30, 30), (33, 33), (57, 57), (130, 130), (1, 40), (34, 19), (600, 130)]  # queries and keys


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
  monkeypatch.setitem(kernels.SIDE, "cpu", 16)
  monkeypatch.setattr(splash, "INTERPRET", True)
  stand_in()


def arrays(l: int, s: int, dtype=jnp.float32, width: int = 8):
  """q, k, v and the gradient of the output."""
  draw = np.random.default_rng(l)
  return [jnp.asarray(draw.normal(size=(2, length, 3, width)), dtype) for length in (l, s, s, l)]


def witness(q, k, v, do, ids) -> list[np.ndarray]:
  """Output, gradients and log-sum-exp in f64; what sees nothing is 0."""
  q, k, v, do = (torch.tensor(np.asarray(x, np.float64)).transpose(1, 2) for x in (q, k, v, do))
  q, k, v = (x.requires_grad_() for x in (q, k, v))
  l = q.shape[2]
  seen = torch.ones(2, 1, l, k.shape[2], dtype=torch.bool)
  if ids is not None:
    queries, keys = (torch.tensor(np.asarray(x.segment)) for x in ids)
    seen = ((queries[:, :, None] == keys[:, None]) & (keys >= 0)[:, None])[:, None]
    if ids[0].rule:
      table = torch.tensor([[how == "1" for how in row] for row in RULES[ids[0].rule].split()])
      queries, keys = (torch.tensor(np.asarray(x.frame)) for x in ids)
      seen = seen & table[queries][:, None].gather(3, keys[:, None, None].expand(*seen.shape[:2], l, -1))
  some = seen.any(-1, keepdim=True)
  o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen | ~some) * some
  logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
  made = [x.detach().transpose(1, 2).numpy() for x in (o, *torch.autograd.grad(o, (q, k, v), do))]
  return [*made, torch.logsumexp(logits, -1).detach().numpy()]


def both(name: str, q, k, v, do, ids):
  """Output and gradients."""
  o, back = jax.vjp(lambda *parts: LOCAL[name].attend(*parts, ids), q, k, v)
  return [o, *back(do)]


def assert_equal(got, want):
  for index, (ours, true) in enumerate(zip(got, want, strict=True)):
    assert np.isfinite(ours).all()
    assert np.abs(ours - true).max() <= (1e-4 if index else 1e-5) * max(np.abs(true).max(), 1), index


def marks(draw, l: int, s: int, rule: Rule | None):
  """Of queries and keys: segments, packed or not, and frames in order as far as a rule asks for them."""
  if rule is None:
    return None
  def one(length):
    frames = jnp.sort(jnp.asarray(draw.integers(0, 4, (2, length))), 1) if rule else None
    return Marks(jnp.asarray(draw.integers(-1, (2 if rule else 3) if rule.packed else 1, (2, length))), frames, rule)

  return one(l), one(s)


@pytest.mark.parametrize(("name", "l", "s", "rule"), [
  (name, *sides, rule) for (name, rule), sides in product(TAKEN, SIDES) if not rule or sides[0] in (33, 34, 130, 600)],
  ids=str)
def test_values_and_gradients_are_those_of_softmax(name, l, s, rule):
  parts, ids = arrays(l, s), marks(np.random.default_rng(s), l, s, rule)
  assert_equal(jax.jit(partial(both, name))(*parts, ids), witness(*parts, ids)[:4])


@pytest.mark.parametrize(("name", "rule"), [pair for pair in TAKEN if pair[1] is not None], ids=str)
def test_any_segments_and_frames(name, rule):
  """Also such in which whole tiles, or all keys of some queries, are hidden."""
  parts = arrays(34, 19)
  step = jax.jit(partial(both, name))
  ids = st.lists(st.integers(-2, 2), min_size=53, max_size=53) | st.lists(
    st.integers(-2, 2), min_size=53, max_size=53).map(sorted)
  frames = st.lists(st.integers(0, 3), min_size=53, max_size=53)

  @settings(max_examples=20, deadline=None)
  @given(ids, ids, frames | frames.map(sorted))
  def law(one, other, frame):
    segments = jnp.minimum(jnp.array([one, other]), 9 if rule.packed else 0)
    whole = Marks(segments, jnp.array([frame, frame[::-1]]) if rule else None, rule)
    pair = jax.tree.map(lambda x: x[:, :34], whole), jax.tree.map(lambda x: x[:, 34:], whole)
    assert_equal(step(*parts, pair), witness(*parts, pair)[:4])

  law()


def test_tiles_that_see_nothing_are_not_worked():
  """Where they are, a hidden value that is no number still makes none of the sum, as it weighs 0."""
  frames = jnp.arange(64)[None] // 16
  ids = (Marks(jnp.zeros_like(frames), frames, Rule(window=0)),) * 2
  q, k, v, _ = (x[:1] for x in arrays(64, 64))
  run = jax.jit(lambda name, v: LOCAL[name].attend(q, k, v, ids), static_argnums=0)
  lost = {name: np.isnan(run(name, v.at[:, 16:32].set(jnp.nan))).any((0, 2, 3)) for name in ("dense", "blockwise")}
  assert lost["dense"].all() and (lost["blockwise"] == (np.arange(64) // 16 == 1)).all()


@pytest.mark.parametrize("name", BLOCKS)
def test_the_log_sum_exp_is_of_all_keys_and_finite_where_none_is_seen(name):
  parts = arrays(33, 57)
  ids = Marks(jnp.arange(66).reshape(2, 33) % 4 - 1), Marks(jnp.arange(114).reshape(2, 57) % 2)
  ids = ids if takes(name, ALL) else None
  lse, true = LOCAL[name].block.forward(*parts[:3], ids)[1], witness(*parts, ids)[4]
  none = np.isneginf(true)
  assert none.any() == (ids is not None) and (lse[none] == splash.EMPTY).all() and apart(lse[~none], true[~none]) < 1e-6


@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize("name", BLOCKS)
def test_bf16_inputs_meet_an_f32_softmax(name, width):
  parts = arrays(57, 57, jnp.bfloat16, width)
  o, lse = LOCAL[name].block.forward(*parts[:3])
  want = witness(*parts, None)
  # Splash scales q in bf16. 1/sqrt(16) is a power of two, and rounds nothing; 1/sqrt(128) rounds q by up to 2^-9.
  again = name == "splash" and width == 128
  assert o.dtype == lse.dtype == jnp.float32 and apart(lse, want[4]) < (2**-9 if again else 1e-6)
  got = both(name, *parts, None)
  assert all(x.dtype == jnp.bfloat16 for x in got)
  # bf16 keeps 8 bits: weights, the output and logits' gradients are rounded once each.
  assert all(apart(x.astype(jnp.float32), true) < 1e-2 for x, true in zip(got, want[:4], strict=True))


@pytest.mark.parametrize(("dtype", "most"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_ring_of_mapped_devices_is_one_softmax(name, dtype, most):
  """As a ring is worked on one device; of odd shares. In bf16 each block's results are rounded, and their sum."""
  def share(q, k, v, do):
    o, back = jax.vjp(lambda *parts: ring(*parts, None, Route(("seq",)), LOCAL[name].block), q, k, v)
    return [o, *back(do)]

  parts = arrays(24, 24, dtype, 16)
  shares = [rearrange(x, "b (r l) a k -> r b l a k", r=8) for x in parts]
  made = jax.jit(jax.vmap(share, axis_name="seq"))(*shares)
  for got, want in zip(made, witness(*parts, None)[:4], strict=True):
    assert got.dtype == dtype and apart(rearrange(got.astype(jnp.float32), "r b l a k -> b (r l) a k"), want) < most


def layers(name: str, policy: str, parts, ids=None):
  """The gradient of a stack of layers, traced: scanned and rematerialised as the network's are."""
  def layer(q, kv):
    return jax.checkpoint(partial(LOCAL[name].attend, ids=ids), policy=REMAT[policy])(q, *kv), None

  def stack(q, k, v):
    return jax.lax.scan(layer, q, (jnp.stack([k] * 3), jnp.stack([v] * 3)))[0]

  return jax.jit(lambda q, k, v, do: jax.vjp(stack, q, k, v)[1](do)).trace(*parts)


@pytest.mark.parametrize("name", ["dense", "blockwise"])
def test_attention_is_computed_once_under_its_policy(name):
  """Exponentials of a tile of logits: forward, backward, and when forward is done again."""
  side = LOCAL[name].block.forward.__self__.side(64)
  weights = re.compile(rf"= f32\[6,{side},{side}\]\S* exponential\(")
  count = {policy: len(weights.findall(layers(name, policy, arrays(64, 64)).lower().compile().as_text()))
           for policy in ("none", "attention", "full")}
  assert count == {"none": 2, "attention": 2, "full": 3}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_splash_is_lowered_for_a_tpu_and_computed_once_under_its_policy(dtype, monkeypatch):
  """Three programs: forward, gradients of keys and values, gradient of queries."""
  monkeypatch.setattr(splash, "INTERPRET", False)
  count = {}
  for policy in ("none", "attention", "full"):
    text = layers("splash", policy, arrays(600, 130, dtype)).lower(lowering_platforms=("tpu",)).as_text()
    assert "has_side_effect = true" not in text  # so that XLA drops a program whose results nothing reads
    count[policy] = sum(f"{name}#" in function for function in text.split("func.func")
                        for name in re.findall(r"(%\d+):\d+ = stablehlo.custom_call @tpu_custom_call", function))
  assert count == {"none": 3, "attention": 3, "full": 4}


def test_cudnn_is_lowered_for_a_card_and_computed_once_under_its_policy():
  """Also of odd lengths, which are filled up."""
  for l, s in ((64, 64), (63, 257)):
    count = {}
    for policy in ("none", "attention", "full"):
      text = layers("cudnn", policy, arrays(l, s, jnp.bfloat16)).lower(lowering_platforms=("cuda",)).as_text()
      count[policy] = [len(re.findall(rf"@__cudnn\$fmhaSoftmax{way}\(", text)) for way in ("", "Backward")]
    assert count == {"none": [1, 1], "attention": [1, 1], "full": [2, 1]}


@pytest.mark.parametrize("rule", [None, ALL, Rule(window=1)], ids=str)
def test_memory_grows_with_the_length_and_not_with_its_square(rule, monkeypatch):
  """Temporary memory of the gradients of a stack of layers, when a tile is small beside the clip."""
  monkeypatch.setitem(kernels.LOGITS, "cpu", 1)

  @cache
  def memory(name, l):
    array, ids = jax.ShapeDtypeStruct((1, l, 2, 8), jnp.float32), jnp.arange(l)[None] // 128
    ids = None if rule is None else (Marks(jnp.zeros_like(ids), ids if rule else None, rule),) * 2
    step = layers(name, "full", [array] * 4, ids).lower()
    return step.compile({"xla_cpu_enable_concurrency_optimized_scheduler": False}).memory_analysis().temp_size_in_bytes

  grow = {name: [memory(name, 2 * l) / memory(name, l) for l in (1024, 2048)] for name in ("dense", "blockwise")}
  assert max(grow["blockwise"]) < 2.1 and min(grow["dense"]) > 3.6, grow
  assert memory("blockwise", 4096) < memory("dense", 4096) / 25


def absent(platform: str) -> jax.sharding.AbstractMesh:
  """A mesh of one device that is not here."""
  device = jax.sharding.AbstractDevice(platform, None, platform)
  return jax.sharding.AbstractMesh((1,), ("seq",), abstract_device=device)


@pytest.mark.parametrize(("platform", "most", "unit"), [("cpu", 16, 1), ("gpu", 1024, 128), ("tpu", 1024, 128)])
@given(length=st.integers(1, 10**6))
def test_tiles_are_few_and_alike(platform, most, unit, length):
  with jax.sharding.use_abstract_mesh(absent(platform)):
    side = kernels.even(length)
  count = -(-length // side)
  assert side <= most and count == -(-length // most) and side % unit == 0 and count * side - length < count * unit


@pytest.mark.parametrize(("platform", "tile"), [("cpu", "1,16,16"), ("gpu", "6,768,768")])
def test_tiles_are_those_of_the_devices_that_a_program_is_made_for(platform, tile, monkeypatch):
  """Forward and backward; which heads are worked at once, too."""
  monkeypatch.setitem(kernels.LOGITS, "cpu", 1)
  run = jax.shard_map(partial(both, "blockwise", ids=None), mesh=absent(platform), in_specs=jax.P(), out_specs=jax.P(),
                      check_vma=False)
  traced = str(jax.make_jaxpr(run)(*[jax.ShapeDtypeStruct((2, 1500, 3, 8), jnp.float32)] * 4))
  assert re.findall(r"f32\[(\d+,\d+,\d+)\] = exp ", traced) == [tile] * 2


RUNS = list(product(("float32", "bfloat16", "float16"), (1, 2), (None, PADDED, ALL, Rule(causal=True)), (False, True)))


def refusal(kernel: str, dtype: str, seq: int, rule: Rule | None, trains: bool) -> str:
  """Why a kernel is refused, or nothing."""
  try:
    attention.check("ring", kernel, mesh.build({"seq": seq}, count=seq), 4, dtype, rule, trains)
  except BadInput as mistake:
    return str(mistake)
  return ""


@pytest.mark.parametrize("here", ["dense", "cudnn", "splash"])
def test_a_refusal_names_the_kernels_that_are_not_refused(here, monkeypatch):
  """here: which kernel's platform this machine poses as."""
  monkeypatch.setitem(LOCAL, here, LOCAL[here]._replace(platform="cpu"))
  monkeypatch.setitem(LOCAL, "forward", LOCAL["dense"]._replace(trains=False))
  said = {(name, run): refusal(name, *run) for name in LOCAL for run in RUNS}
  for (name, run), words in said.items():
    named = words.split("use one of ")[1].rstrip(".").split(", ") if words else [name]
    assert set(named) <= {other for other in LOCAL if not said[other, run]} and "\n" not in words
    assert not words or set(named) == {other for other in LOCAL if not said[other, run]}


@pytest.mark.parametrize(("kernel", "platform", "run", "words"), [
  ("cudnn", "gpu", ("bfloat16", 1, None, True), "needs a GPU, here is a cpu: use one of dense, blockwise."),
  ("splash", "tpu", ("float32", 1, None, True), "needs a TPU, here is a cpu: use one of dense, blockwise."),
  ("splash", "cpu", ("float16", 1, None, True), "works in float32 or bfloat16, not in float16: use one of dense"),
  ("bare", "cpu", ("float32", 2, None, True), "returns no log-sum-exp, which a ring of 2 needs: use one of dense,"),
  ("cudnn", "cpu", ("bfloat16", 1, ALL, True), "takes no rows that clips share: use one of dense, blockwise."),
  ("splash", "cpu", ("float32", 1, Rule(window=2), True), "hides no frames from each other: use one of dense, blockw"),
])
def test_what_a_kernel_cannot_do_is_said(kernel, platform, run, words, monkeypatch):
  bare = LOCAL["dense"]._replace(block=None)
  monkeypatch.setitem(LOCAL, kernel, {"bare": bare, **LOCAL}[kernel]._replace(platform=platform))
  assert refusal(kernel, *run).startswith(f"kernel {kernel!r} {words}")


@pytest.mark.parametrize("rule", [ALL, Rule(causal=True, packed=False)], ids=str)
def test_cudnn_refuses_more_than_padding_also_where_nothing_was_checked(rule):
  (q, k, v, _), zeros = arrays(8, 8), jnp.zeros((2, 8), jnp.int32)
  with pytest.raises(BadInput, match="hides neither frames nor clips that share a row from each other"):
    LOCAL["cudnn"].attend(q, k, v, (Marks(zeros, zeros, rule),) * 2)


@pytest.mark.parametrize("width", [12, 264])
def test_cudnn_refuses_heads_that_are_too_wide_or_no_multiple_of_8(width):
  with pytest.raises(BadInput, match=f"a multiple of 8 and at most 256, got {width}: use 'blockwise'"):
    LOCAL["cudnn"].attend(*arrays(8, 8, jnp.bfloat16, width)[:3])


def test_splash_refuses_rules_of_frames_also_where_nothing_was_checked():
  q, k, v, _ = arrays(8, 8)
  zeros = jnp.zeros((2, 8), jnp.int32)
  with pytest.raises(BadInput, match="kernel 'splash' hides no frames: choose mask 'all', or kernel 'blockwise'"):
    LOCAL["splash"].attend(q, k, v, (Marks(zeros, zeros, Rule(window=1)),) * 2)
