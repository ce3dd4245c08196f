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
from quick import QUICK

from anisora_jax.errors import BadInput
from anisora_jax.models import attention, kernels, splash
from anisora_jax.models.attention import LOCAL, PATTERNS
from anisora_jax.models.wan.dit import WanDiT
from anisora_jax.models.wan.placement import RULES
from anisora_jax.models.wan.sizes import Size
from anisora_jax.parallel import mesh, placement, traffic

HEADS = {"ring": 3, "ring_both": 3, "ulysses": 8, "hybrid": 6}
TOGETHER = {"ulysses": {2: 2, 4: 4, 8: 8}, "hybrid": {2: 2, 4: 2, 8: 2}}  # so many devices exchange heads
# Of two devices a ring goes one way, and the hybrid is Ulysses: see below.
SPLITS = [(pattern, seq) for seq in (2, 4, 8) for pattern in HEADS if seq > 2 or pattern in ("ring", "ulysses")]
LENGTHS = (30, 32, 33, 57)
FRAMES, WIDTH = 3, 4


def on(seq: int):
  return mesh.build({"seq": seq}, count=seq)


def softmax(q, k, v, do, ids) -> list[np.ndarray]:
  """Attention and its gradients with nothing clever, in f64."""
  q, k, v, do = (x.astype(np.float64).reshape(len(x), -1, *x.shape[-2:]) for x in (q, k, v, do))
  ids = ids.reshape(len(ids), -1)
  seen = ((ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, None])[:, None]
  weights = np.where(seen, np.exp(np.einsum("blak,bsak->bals", q, k) / np.sqrt(WIDTH)), 0.0)
  weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
  o, slope = np.einsum("bals,bsak->blak", weights, v), np.einsum("blak,bsak->bals", do, v)
  dlogits = weights * (slope - np.sum(weights * slope, -1, keepdims=True)) / np.sqrt(WIDTH)
  return [o, np.einsum("bals,bsak->blak", dlogits, k), np.einsum("bals,blak->bsak", dlogits, q),
          np.einsum("bals,blak->bsak", weights, do)]


@cache
def case(heads: int, padded: int, lengths: tuple[int, ...], masked: bool):
  """((q, k, v, do), ids, what is true): of each length a clip that is only padded, and one packed of segments."""
  draw, ids = np.random.default_rng(padded), np.full((2 * len(lengths), FRAMES, padded), -1, np.int32)
  for clip, length in enumerate(lengths):
    ids[2 * clip, :, :length], ids[2 * clip + 1, :, :length] = 0, draw.integers(0, 3, (FRAMES, length))
  ids = ids if masked else np.zeros_like(ids)
  arrays = tuple(draw.normal(size=(*ids.shape, heads, WIDTH)).astype(np.float32) for _ in range(4))
  return arrays, ids if masked else None, softmax(*arrays, ids)


def cases(pattern: str, seq: int) -> list:
  """Tokens of a frame are padded as the network pads them; where they divide, once more without any mask."""
  sizes = {length + -length % seq: [] for length in LENGTHS}
  for length in LENGTHS:
    sizes[length + -length % seq].append(length)
  masked = [case(HEADS[pattern], padded, tuple(lengths), True) for padded, lengths in sizes.items()]
  return [*masked, case(HEADS[pattern], 32, (32,), False)]


def attend(pattern: str, seq: int, kernel: str, arrays, ids):
  """(attention, its gradients), which like those of a network wait until attention is done."""
  *arrays, do = arrays
  o, back = jax.vjp(lambda *parts: PATTERNS[pattern](*parts, ids, on(seq), kernel), *arrays)
  return o, *back(jnp.where(jnp.isnan(o), jnp.nan, do).astype(do.dtype))


def one_after_another(pattern, seq, kernel, given):
  """No case may start before the last one is done: on simulated devices its collectives could overtake."""
  made, known = [], 0.0
  for arrays, ids in given:
    made.append(attend(pattern, seq, kernel, [jnp.where(jnp.isnan(known), jnp.nan, x) for x in arrays], ids))
    known = sum(x.sum() for x in made[-1])
  return made


def ways(pattern: str, seq: int) -> int:
  return 2 if pattern == "ring_both" and seq > 2 else 1


@pytest.mark.parametrize(("pattern", "seq", "kernel", "logits"), [
  *((pattern, seq, "dense", 1000 if seq == 4 else 2**20) for pattern, seq in SPLITS),
  *((pattern, seq, "blockwise", 1 if pattern == "ring" and seq == 2 else 2**20) for pattern, seq in SPLITS),
  ("ring_both", 4, "splash", 0)])
def test_every_scheme_is_one_softmax_and_has_its_collectives(pattern, seq, kernel, logits, monkeypatch):
  """Values and gradients; the collectives of the compiled program. logits: so many at once, so that heads part."""
  monkeypatch.setitem(kernels.SIDE, "cpu", 20)
  monkeypatch.setitem(kernels.LOGITS, "cpu", logits)
  monkeypatch.setattr(splash, "INTERPRET", True)
  monkeypatch.setattr(attention, "STRAIGHT", ())  # as on accelerators; here nothing else is sent beside the loop
  chosen = cases(pattern, seq)[slice(1, 2) if kernel == "splash" else slice(None)]
  given = [(arrays, ids) for arrays, ids, _ in chosen]
  split, whole = NamedSharding(on(seq), P(None, None, "seq")), NamedSharding(on(seq), P())
  placed = [((split,) * 4, None if ids is None else whole) for _, ids in given]
  run = jax.jit(partial(one_after_another, pattern, seq, kernel), in_shardings=(placed,), out_shardings=split)
  compiled = run.lower(given).compile(QUICK)
  for made, (_, _, true) in zip(compiled(jax.device_put(given, placed)), chosen, strict=True):
    for got, want, most in zip(made, true, (1e-5, 1e-4, 1e-4, 1e-4), strict=True):
      assert apart(np.reshape(got, want.shape), want) < most

  hlo, together = compiled.as_text(), TOGETHER.get(pattern, {}).get(seq, 1)
  counts = Counter({kind: one.count for kind, one in traffic.sent(hlo).items()})
  assert counts["all-to-all"] == (8 * len(given) if together > 1 else 0)
  hops = 2 * ways(pattern, seq) * (seq // together - 1)  # of keys and values, one round
  assert counts["collective-permute"] == 3 * hops * len(given)  # XLA sees that both passes begin with the same hop
  assert set(counts) <= {"all-to-all", "collective-permute", "all-reduce"}  # the sums of `one_after_another`
  assert overtaking(hlo) == []


def inner(equation) -> list:
  """The programs inside an operation."""
  found = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
  return [x for x in (getattr(x, "jaxpr", x) for x in found) if hasattr(x, "eqns")]


def operations(equation) -> set[str]:
  """Names, its own and of all inside."""
  return {equation.primitive.name}.union(*(operations(x) for part in inner(equation) for x in part.eqns))


def sends(jaxpr, times: int = 1) -> Counter:
  """{(from, to): bytes} of permutes, and {"exchanged": bytes a device sends}; of a traced program, loops multiplied."""
  found = Counter()
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    size = sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in equation.invars if hasattr(x.aval, "dtype"))
    assert not re.search("psum|gather$|reduce_scatter", name) or name == "gather", name
    if name == "ppermute":
      found.update(dict.fromkeys(params["perm"], times * size))
    elif name == "all_to_all":
      group = len(params["axis_index_groups"][0])
      found["exchanged"] += times * size * (group - 1) // group
    for part in inner(equation):
      found.update(sends(part, times * params["length"] if name == "scan" else times))
  return found


def traced(pattern: str, seq: int, heads: int, n: int, dtype=jnp.float32, ids: bool = False):
  array = jax.ShapeDtypeStruct((2, 1, n, heads, WIDTH), dtype)
  segments = jax.ShapeDtypeStruct((2, 1, n), jnp.int32) if ids else None
  return jax.make_jaxpr(partial(attend, pattern, seq, "dense"))([array] * 4, segments)


@pytest.mark.parametrize(("dtype", "ids"), [(jnp.float32, True), (jnp.bfloat16, False)])
@pytest.mark.parametrize(("pattern", "seq"), SPLITS)
def test_what_is_sent_is_what_the_formulas_say(pattern, seq, dtype, ids):
  found = sends(traced(pattern, seq, HEADS[pattern], 4 * seq, dtype, ids).jaxpr)
  together = TOGETHER.get(pattern, {}).get(seq, 1)
  r, share, size = seq // together, 2 * 4 * HEADS[pattern] * WIDTH, jnp.dtype(dtype).itemsize
  assert found.pop("exchanged", 0) == 8 * share * size * (together - 1) / together  # q, k, v, o and their gradients
  # Keys and values go round in both passes; their gradients in f32, and as what they are gradients of on the last hop.
  ring = 2 * share * (2 * (r - 1) * size + (r - 1) * 4 + size) if r > 1 else 0
  assert sum(found.values()) == seq * ring
  assert max(found.values(), default=0) == ring / ways(pattern, seq)


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


@pytest.mark.parametrize(("pattern", "seq"), [("ring", 4), ("ring_both", 4), ("hybrid", 8)])
def test_transfers_can_hide_behind_the_products_of_a_turn(pattern, seq):
  """In every turn of both loops, nothing that is sent needs a product, and no product what arrives."""
  found = loops(traced(pattern, seq, HEADS[pattern], 4 * seq).jaxpr)
  assert len(found) == 2
  for body in found:
    assert {"ppermute", "dot_general"} <= set().union(*map(operations, body.eqns))
    assert not waits(body, "ppermute", "dot_general") and not waits(body, "dot_general", "ppermute")


def test_a_scheme_that_has_no_room_is_the_simpler_one():
  """Two devices have one neighbour, one token no halves; heads that divide are all exchanged, others ring."""
  def same(one, other):
    texts = [re.sub(r" at 0x\w+|ring_both|\bboth=\w+", "", str(traced(*parts))) for parts in (one, other)]
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
  seen = ((ids[0][:, :, None] == ids[1][:, None]) & (ids[1] >= 0)[:, None])[:, None]
  weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits, -1e9)), 0.0)
  return jnp.einsum("bals,bsak->blak", weights, v)


def training(heads: int, sizes: tuple[int, ...], pattern: str, kernel: str):
  """(loss and gradients of a batch with 15 tokens a frame, the compiled program)."""
  size = Size(layers=2, width=8 * heads, heads=heads, mlp=32, channels=4, given=0, text_width=16, text_tokens=6,
              image_width=0, waves=32)
  there = mesh.build(dict(zip(mesh.AXES, sizes, strict=True)), count=math.prod(sizes))
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
                out_shardings=(None, placed)).lower(params, batch).compile(QUICK)
  return run(*jax.device_put((params, batch), (placed, split))), run.as_text()


@pytest.fixture(scope="module")
def truth():
  """Heads -> loss and gradients on one device."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(LOCAL, "bare", kernels.Local(bare))
    yield cache(lambda heads: training(heads, (1, 1, 1, 1, 1), "full", "bare")[0])


# A block goes round twice and its gradients once. Of exchanges there are 8, and 4 again, for what blocks do not keep.
@pytest.mark.parametrize(("pattern", "kernel", "heads", "hops", "exchanges"), [
  ("ring", "dense", 4, 6 + 6 + 8, 0), ("ring_both", "dense", 4, 2 * (6 + 6 + 8), 0),
  ("ulysses", "bare", 4, 0, 12), ("hybrid", "dense", 6, 2 + 2 + 4, 12)])
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
  attention.check("ulysses", "bare", on(8), 8, "float32")
  attention.check("hybrid", "bare", on(8), 8, "float32")
  for pattern, heads, ring in (("ring", 8, 8), ("ring_both", 8, 8), ("hybrid", 6, 4)):
    with pytest.raises(BadInput, match=f"kernel 'bare' returns no log-sum-exp, which a ring of {ring} needs"):
      attention.check(pattern, "bare", on(8), heads, "float32")
