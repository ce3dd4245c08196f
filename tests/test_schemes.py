"""Every way in which devices share attention is one softmax, sends what its formula says, and trains the network."""

import math
import re
from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import apart
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from overtake import overtaking
from plain import inner, operations, sends
from schemes import HEADS, SEEN, WIDTH, assert_softmax, attend, case, on

from anisora_jax.errors import BadInput
from anisora_jax.models import attention, kernels, splash
from anisora_jax.models.attention import LOCAL
from anisora_jax.models.wan.dit import WanDiT
from anisora_jax.models.wan.placement import RULES
from anisora_jax.models.wan.sizes import Size
from anisora_jax.parallel import mesh, placement, traffic
from anisora_jax.parallel.sight import ALL, Rule, sees

SHARED = ("ring", "ring_both", "ulysses", "hybrid")
TOGETHER = {"ulysses": {2: 2, 4: 4, 8: 8}, "hybrid": {2: 2, 4: 2, 8: 2}}  # so many devices exchange heads
# Of two devices a ring goes one way, and the hybrid is Ulysses: see below.
TOKENS_SPLIT = [(pattern, 1, seq) for seq in (2, 4, 8) for pattern in SHARED
                if seq > 2 or pattern in ("ring", "ulysses")]
FRAMES_SPLIT = [("ring", 2, 1), ("ulysses", 2, 1), ("ring", 4, 1), ("ring_both", 2, 2), ("ulysses", 2, 2),
                ("hybrid", 4, 1), ("ring", 4, 2), ("ring_both", 8, 1), ("ulysses", 2, 4), ("hybrid", 4, 2)]
SPLITS = TOKENS_SPLIT + FRAMES_SPLIT
GROUPS = (30, 32), (33,), (57,)  # lengths of clips that come together
DEALT = [rule for rule in SEEN if rule.packed]  # padding alone is a part of each of them


def rules(pattern: str, clip: int, seq: int, kernel: str) -> list[Rule]:
  """One for each group of lengths: dealt out, so that all come with every scheme and kernel, in `make proof`."""
  splits = TOKENS_SPLIT if kernel == "dense" else FRAMES_SPLIT
  first = len(GROUPS) * [split for split in splits if split[0] == pattern].index((pattern, clip, seq))
  return [DEALT[(first + at) % len(DEALT)] for at in range(len(GROUPS))]


def cases(pattern: str, clip: int, seq: int, kernel: str) -> list:
  """All with padding and segments; last comes a clip that divides, without any mask."""
  masked = [case(HEADS[pattern], clip, lengths[-1] + -lengths[-1] % seq, lengths, rule)
            for lengths, rule in zip(GROUPS, rules(pattern, clip, seq, kernel), strict=True)]
  return [*masked, case(HEADS[pattern], clip, 32, (32,), None)]


def test_every_rule_comes_with_every_scheme_and_kernel():
  for pattern in SHARED:
    for kernel, splits in (("dense", TOKENS_SPLIT), ("blockwise", FRAMES_SPLIT)):
      dealt = {rule for name, *split in splits if name == pattern for rule in rules(name, *split, kernel)}
      assert dealt == set(DEALT), (pattern, kernel)
  assert {(clip, seq) for _, clip, seq in SPLITS} == {(clip, seq) for clip in (1, 2, 4, 8) for seq in (1, 2, 4, 8)
                                                     if 1 < clip * seq <= 8}


def ways(pattern: str, shards: int) -> int:
  return 2 if pattern == "ring_both" and shards > 2 else 1


@pytest.mark.parametrize(("pattern", "clip", "seq", "kernel", "logits"), [
  *((*split, "dense", 1000 if split[2] == 4 else 2**20) for split in TOKENS_SPLIT),
  *(pytest.param(*split, "blockwise", 1 if split == ("ring", 2, 1) else 2**20,
                 marks=pytest.mark.product if split[1] * split[2] == 8 else ()) for split in FRAMES_SPLIT),
  ("ring_both", 1, 4, "splash", 0)])
def test_every_scheme_is_one_softmax_and_has_its_collectives(pattern, clip, seq, kernel, logits, monkeypatch):
  """Values and gradients; the collectives of the compiled program. logits: so many at once, so that heads part."""
  monkeypatch.setitem(kernels.SIDE, "cpu", 20)
  monkeypatch.setitem(kernels.LOGITS, "cpu", logits)
  monkeypatch.setattr(splash, "INTERPRET", True)
  monkeypatch.setattr(attention, "STRAIGHT", ())  # as on accelerators; here nothing else is sent beside the loop
  chosen = [case(3, 1, 36, (33,), ALL)] if kernel == "splash" else cases(pattern, clip, seq, kernel)
  hlo, shards = assert_softmax(pattern, on(clip, seq), kernel, chosen), clip * seq
  together = TOGETHER.get(pattern, {}).get(shards, 1)
  counts = Counter({kind: one.count for kind, one in traffic.sent(hlo).items()})
  assert counts["all-to-all"] == (8 * len(chosen) if together > 1 else 0)
  hops = 2 * ways(pattern, shards) * (shards // together - 1)  # of keys and values, one round
  assert counts["collective-permute"] == 3 * hops * len(chosen)
  assert set(counts) <= {"all-to-all", "collective-permute", "all-reduce"}  # the sums of `schemes`
  assert overtaking(hlo) == []


@pytest.mark.parametrize("pattern", [*SHARED, "local_global"])
def test_replicas_share_attention_among_their_own_devices(pattern):
  """As a step works them, each a part of the batch that `vmap` maps to its devices."""
  rule = Rule(window=1, stride=3)
  arrays, ids, _, true = case(HEADS[pattern], 2, 30, (30,), rule)  # two clips, one for each
  there, split = mesh.build({"replica": 2, "clip": 2, "seq": 2}), P("replica", None, "clip", "seq")
  placed = (NamedSharding(there, split),) * 4, NamedSharding(there, P("replica"))
  each = jax.vmap(lambda arrays, ids: attend(pattern, there, "dense", arrays, ids, rule), spmd_axis_name="replica")
  run = jax.jit(each, in_shardings=placed, out_shardings=placed[0][0])
  given = jax.tree.map(lambda x: np.expand_dims(x, 1), (arrays, ids))
  hlo = run.lower(*given).compile()
  for got, want in zip(hlo(*jax.device_put(given, placed)), true, strict=True):
    assert apart(np.reshape(got, want.shape), want) < 1e-4
  sent = {kind for kind, one in traffic.sent(hlo.as_text()).items() if one.bytes > 1000}
  assert sent and "all-reduce" not in sent, sent  # of the replicas nobody needs the others


def traced(pattern: str, there, heads: int, n: int, dtype=jnp.float32, rule: Rule | None = None):
  array = jax.ShapeDtypeStruct((2, there.shape["clip"], n, heads, WIDTH), dtype)
  segments = None if rule is None else jax.ShapeDtypeStruct(array.shape[:3], jnp.int32)
  return jax.make_jaxpr(partial(attend, pattern, there, "dense", rule=rule or ALL))([array] * 4, segments)


@pytest.mark.parametrize(("dtype", "rule"), [(jnp.float32, Rule(True, 1)), (jnp.bfloat16, None)], ids=str)
@pytest.mark.parametrize(("pattern", "clip", "seq"), SPLITS)
def test_what_is_sent_is_what_the_formulas_say(pattern, clip, seq, dtype, rule):
  found, shards = sends(traced(pattern, on(clip, seq), HEADS[pattern], 4 * seq, dtype, rule).jaxpr), clip * seq
  together = TOGETHER.get(pattern, {}).get(shards, 1)
  r, share, size = shards // together, 2 * 4 * HEADS[pattern] * WIDTH, jnp.dtype(dtype).itemsize
  assert found.pop("exchanged", 0) == 8 * share * size * (together - 1) / together  # q, k, v, o and their gradients
  # Keys and values go round in both passes; their gradients in f32, and as what they are gradients of on the last hop.
  ring = 2 * share * (2 * (r - 1) * size + (r - 2) * 4 + size) if r > 1 else 0
  assert sum(found.values()) == shards * ring
  assert max(found.values(), default=0) == ring / ways(pattern, shards)


def test_memory_grows_with_the_length_and_shrinks_with_the_devices(monkeypatch):
  """Temporary memory of a ring's gradients on one device, when a tile is small beside its share."""
  monkeypatch.setitem(kernels.SIDE, "cpu", 16)
  monkeypatch.setitem(kernels.LOGITS, "cpu", 1)
  monkeypatch.setattr(attention, "STRAIGHT", ())

  def memory(seq, n, rule=ALL):
    array = jax.ShapeDtypeStruct((1, 4, n, 2, 8), jnp.float32)
    step = jax.jit(lambda *arrays: attend("ring", on(1, seq), "blockwise", arrays, None, rule)).lower(*[array] * 4)
    return step.compile({"xla_cpu_enable_concurrency_optimized_scheduler": False}).memory_analysis().temp_size_in_bytes

  base = memory(4, 2048)
  found = {"longer": memory(4, 4096) / base, "longest": memory(4, 8192) / base, "more": memory(8, 4096) / base,
           "causal": memory(4, 4096, Rule(causal=True)) / memory(4, 2048, Rule(causal=True))}
  assert 1.9 < found["longer"] < 2.1 and 3.8 < found["longest"] < 4.2 and 0.9 < found["more"] < 1.1, found
  assert found["causal"] < 2.2, found


def loops(jaxpr) -> list:
  """The bodies of all loops in which something is sent."""
  found = [part for x in jaxpr.eqns for part in inner(x) if x.primitive.name == "scan" and "ppermute" in operations(x)]
  return found + [loop for x in jaxpr.eqns for part in inner(x) for loop in loops(part)]


def waits(body, first: str, then: str) -> bool:
  """Whether an operation `then` needs what one of `first` gives."""
  known = set()
  for equation in body.eqns:
    late = any(id(x) in known for x in equation.invars)
    if late and then in operations(equation):
      return True
    if late or first in operations(equation):
      known.update(map(id, equation.outvars))
  return False


@pytest.mark.parametrize("rule", [None, Rule(causal=True)], ids=str)
@pytest.mark.parametrize(("pattern", "seq"), [("ring", 4), ("ring_both", 4), ("hybrid", 8)])
def test_transfers_can_hide_behind_the_products_of_a_turn(pattern, seq, rule):
  """In every turn of both loops, nothing that is sent needs a product, and no product what arrives."""
  found = loops(traced(pattern, on(1, seq), HEADS[pattern], 4 * seq, rule=rule).jaxpr)
  assert len(found) == 2
  for body in found:
    assert {"ppermute", "dot_general"} <= set().union(*map(operations, body.eqns))
    assert not waits(body, "ppermute", "dot_general") and not waits(body, "dot_general", "ppermute")


def test_a_scheme_that_has_no_room_is_the_simpler_one():
  """Two devices have one neighbour, one token no halves; heads that divide are all exchanged, others ring."""
  def same(one, other):
    texts = [re.sub(r" at 0x\w+|ring_both|\bboth=\w+", "", str(traced(name, on(1, seq), *parts)))
             for name, seq, *parts in (one, other)]
    return texts[0] == texts[1]

  assert same(("ring_both", 2, 3, 8), ("ring", 2, 3, 8)) and not same(("ring_both", 4, 3, 8), ("ring", 4, 3, 8))
  assert same(("ring_both", 8, 3, 8), ("ring", 8, 3, 8)) and not same(("ring_both", 8, 3, 16), ("ring", 8, 3, 16))
  assert same(("hybrid", 4, 8, 8), ("ulysses", 4, 8, 8)) and not same(("hybrid", 4, 6, 8), ("ring", 4, 6, 8))
  assert same(("hybrid", 4, 3, 8), ("ring", 4, 3, 8))


def bare(q, k, v, ids, *name):
  """A kernel without a log-sum-exp, and with the gradients that JAX finds."""
  logits = jnp.einsum("blak,bsak->bals", q, k) / np.sqrt(q.shape[-1])
  if ids is None:
    return jnp.einsum("bals,bsak->blak", jax.nn.softmax(logits), v)
  known = jax.vmap(sees)(*ids)[:, None]
  weights = jnp.where(known, jax.nn.softmax(jnp.where(known, logits, -1e9)), 0.0)
  return jnp.einsum("bals,bsak->blak", weights, v)


def training(heads: int, sizes: tuple[int, ...], pattern: str, kernel: str):
  """(loss and gradients of a batch with 15 tokens a frame, the compiled program)."""
  size = Size(layers=2, width=8 * heads, heads=heads, mlp=32, channels=4, given=0, text_width=16, text_tokens=6,
              image_width=0, waves=32)
  there = mesh.build(dict(zip(mesh.AXES[1:], sizes, strict=True)), count=math.prod(sizes))
  net, draw = WanDiT(size, there, pattern, kernel), np.random.default_rng(0)
  batch = {"x": draw.normal(size=(2, 2, 6, 10, 4)), "text": draw.normal(size=(2, 5, 16)),
           "t": draw.uniform(size=(2, 2)), "target": draw.normal(size=(2, 2, 6, 10, 4))}
  batch = jax.tree.map(np.float32, batch)
  params = jax.eval_shape(net.init, jax.random.key(0), batch["x"], batch["t"], batch["text"])["params"]
  params = jax.tree.map(lambda x: draw.normal(size=x.shape, scale=x.shape[-2] ** -0.5 if x.ndim > 1 else 0.5)
                        .astype(np.float32), params)
  placed = placement.shardings(RULES, params, there)
  split = jax.tree.map(lambda _: NamedSharding(there, P(mesh.BATCH)), batch)

  def loss(params, x, text, t, target):
    return jnp.square(net.apply({"params": params}, x, t, text) - target).mean()

  run = jax.jit(jax.value_and_grad(lambda params, batch: loss(params, **batch)), in_shardings=(placed, split),
                out_shardings=(None, placed)).lower(params, batch).compile()
  return run(*jax.device_put((params, batch), (placed, split))), run.as_text()


@pytest.fixture(scope="module")
def truth():
  """Heads -> loss and gradients on one device."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(LOCAL, "bare", kernels.Local(bare))
    yield cache(lambda heads: training(heads, (1, 1, 1, 1, 1), "full", "bare")[0])


# A block goes round twice and its gradients once. Of exchanges there are 8, and 4 again, for what blocks do not keep.
@pytest.mark.parametrize(("pattern", "kernel", "heads", "hops", "exchanges"), [
  ("ring", "dense", 4, 3 * 6, 0), ("ring_both", "dense", 4, 2 * 3 * 6, 0),
  ("ulysses", "bare", 4, 0, 12), ("hybrid", "dense", 6, 3 * 2, 12)])
def test_the_network_learns_the_same_by_every_scheme(pattern, kernel, heads, hops, exchanges, truth):
  true_loss, true_gradients = truth(heads)
  (loss, gradients), hlo = training(heads, (2, 1, 1, 4, 1), pattern, kernel)
  assert apart(loss, true_loss) < 1e-5
  worst = jax.tree.map(apart, gradients, true_gradients)
  assert max(jax.tree.leaves(worst)) < 1e-4, worst
  counts = Counter({kind: one.count for kind, one in traffic.sent(hlo).items()})
  assert (counts["collective-permute"], counts["all-to-all"]) == (2 * hops, 2 * exchanges)  # of two blocks
  assert overtaking(hlo) == []


@pytest.mark.parametrize(("pattern", "seq", "tensor", "heads", "words"), [
  ("ulysses", 4, 2, 12, "pattern 'ulysses' needs the heads of a device to divide by clip x seq = 4, got 6 (12 over "
   "tensor = 2): use 'hybrid' or 'ring'."),
  ("full", 2, 1, 4, "needs mesh axes clip x seq = 1, got 2: use 'ring', 'ring_both', 'ulysses', 'hybrid'."),
  ("ulises", 2, 1, 4, "no attention pattern is named 'ulises': did you mean 'ulysses'?"),
])
def test_a_scheme_that_cannot_run_is_refused_in_one_line(pattern, seq, tensor, heads, words):
  with pytest.raises(BadInput, match=re.escape(words)) as mistake:
    attention.check(pattern, "dense", mesh.build({"seq": seq, "tensor": tensor}, count=seq * tensor), heads, "float32")
  assert "\n" not in str(mistake.value)


def test_only_rings_need_a_log_sum_exp(monkeypatch):
  monkeypatch.setitem(LOCAL, "bare", kernels.Local(bare))
  attention.check("ulysses", "bare", on(1, 8), 8, "float32")
  attention.check("hybrid", "bare", on(1, 8), 8, "float32")
  for pattern, heads, ring in (("ring", 8, 8), ("ring_both", 8, 8), ("hybrid", 6, 4)):
    with pytest.raises(BadInput, match=f"kernel 'bare' returns no log-sum-exp, which a ring of {ring} needs"):
      attention.check(pattern, "bare", on(1, 8), heads, "float32")
