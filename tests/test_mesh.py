"""Loss and gradients do not depend on the mesh; parameters live where rules say."""

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_step
from compare import apart
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from anisora_jax.errors import BadInput
from anisora_jax.models import attention, kernels, splash
from anisora_jax.models.blocks import linear
from anisora_jax.models.wan.dit import WanDiT
from anisora_jax.models.wan.placement import IMAGE_RULES, RULES
from anisora_jax.models.wan.sizes import SIZES, Size
from anisora_jax.parallel import mesh, placement, traffic
from anisora_jax.training import step

SIZE = Size(layers=2, width=64, heads=8, mlp=96, channels=4, given=5, text_width=16, text_tokens=6, image_width=16,
            waves=32)
BATCH, FRAMES = 8, 2
MESHES = [shape for shape in product((1, 2, 4, 8), (1, 2, 4, 8), (1,), (1, 2, 4, 8), (1, 2, 4, 8))
          if np.prod(shape) == 8]
# Each pair of axes once; `make proof` runs all.
FIRST = [(1, 8, 1, 1, 1), (1, 1, 1, 8, 1), (1, 1, 1, 1, 8), (2, 4, 1, 1, 1), (2, 1, 1, 4, 1), (1, 4, 1, 2, 1),
         (4, 1, 1, 1, 2), (1, 2, 1, 1, 4), (1, 1, 1, 4, 2)]
LONG = [(1, 1, 8, 1, 1), (1, 1, 2, 4, 1), (1, 1, 4, 1, 2), (1, 2, 2, 2, 1), (2, 1, 2, 1, 2)]  # frames split too
# Tokens of a frame: 16 divide; 15 leave one padding token; 9 on 8 devices leave three devices with padding alone.
GRIDS = {16: (8, 8), 15: (6, 10), 9: (6, 6)}
TOKENS = {1: 15, 2: 15, 4: 9, 8: 9}


def dense_softmax(q, k, v, ids=None, name=""):
  """softmax(q k / sqrt(width)) v with nothing clever."""
  logits = jnp.einsum("blak,bsak->bals", q, k) / np.sqrt(q.shape[-1])
  assert ids is None
  return jnp.einsum("bals,bsak->blak", jax.nn.softmax(logits), v)


def reference_pattern(q, k, v, segments, on, kernel, rule):
  assert segments is None and on.size == 1 and not rule
  return dense_softmax(*(x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (q, k, v))).reshape(q.shape)


def on_mesh(shape: tuple[int, ...]):
  return mesh.build(dict(zip(mesh.AXES[1:], shape, strict=True)), count=int(np.prod(shape)))


@pytest.fixture(scope="module")
def params():
  """Every parameter random, also those that start at zero."""
  array = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  made = jax.eval_shape(WanDiT(SIZE, mesh.build()).init, jax.random.key(0), array((1, 1, 2, 2, 4)), array((1, 1)),
                        array((1, 1, 16)), array((1, 1, 2, 2, 5)), array((1, 3, 16)))["params"]
  draw = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: draw.normal(size=leaf.shape, scale=leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.5)
                      .astype(np.float32), made)


def batch_of(n: int, times: int = FRAMES) -> dict:
  draw, (h, w) = np.random.default_rng(1), GRIDS[n]
  def normal(*shape):
    return draw.normal(size=(BATCH, *shape)).astype(np.float32)

  return {"x": normal(FRAMES, h, w, 4), "text": normal(5, 16), "given": normal(FRAMES, h, w, 5), "image": normal(3, 16),
          "target": normal(FRAMES, h, w, 4), "t": draw.uniform(size=(BATCH, times)).astype(np.float32)}


def compiled(on, params, batch, **options):
  """The gradient step on a mesh, lowered for parameters placed by the rules and a batch split over data x fsdp."""
  net = WanDiT(SIZE, on, **options)
  placed = placement.shardings(RULES + IMAGE_RULES, params, on)
  split = jax.tree.map(lambda _: NamedSharding(on, P(mesh.BATCH)), batch)

  def loss(params, batch):
    inputs = {name: x for name, x in batch.items() if name != "target"}
    return jnp.square(net.apply({"params": params}, **inputs) - batch["target"]).mean()

  step = jax.jit(jax.value_and_grad(loss), in_shardings=(placed, split), out_shardings=(None, placed))
  return step.lower(params, batch).compile()


def run(step, params, batch):
  return step(*jax.device_put((params, batch), step.input_shardings[0]))


@pytest.fixture(scope="module")
def truth(params):
  """n -> loss and gradients on one device with plain softmax attention and automatic derivatives."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(attention.PATTERNS, "reference", reference_pattern)
    patch.setitem(attention.LOCAL, "reference", kernels.Local(dense_softmax))
    options = {"pattern": "reference", "kernel": "reference", "remat": "none"}
    return {n: run(compiled(mesh.build(), params, batch_of(n), **options), params, batch_of(n)) for n in GRIDS}


@pytest.fixture(scope="module")
def built(params):
  """Mesh -> the step compiled for it, once."""
  return cache(lambda shape: compiled(on_mesh(shape), params, batch_of(TOKENS[shape[3]])))


def count_talk(step) -> Counter:
  """How many collectives of each kind stand in a compiled program."""
  return Counter(re.findall(r" (all-reduce|all-gather|collective-permute|reduce-scatter|all-to-all)(?:-start)?\(",
                            step.as_text()))


def assert_true(result, truth):
  (loss, gradients), (true_loss, true_gradients) = result, truth
  assert apart(loss, true_loss) < 1e-5
  worst = jax.tree.map(apart, gradients, true_gradients)
  assert max(jax.tree.leaves(worst)) < 1e-4, worst


@pytest.mark.parametrize("shape", [
  *(pytest.param(shape, marks=() if shape in FIRST else pytest.mark.product) for shape in MESHES), *LONG], ids=str)
def test_loss_and_every_gradient_equal_one_device(shape, params, built, truth):
  n = TOKENS[shape[3]]
  assert_true(run(built(shape), params, batch_of(n)), truth[n])


@pytest.mark.parametrize(("pattern", "kernel", "shape"), [
  ("ring", "blockwise", (1, 2, 1, 2, 2)), ("ring", "splash", (1, 1, 2, 2, 2)), ("ring_both", "dense", (1, 1, 1, 4, 2)),
  ("ulysses", "dense", (1, 1, 1, 4, 2)), ("hybrid", "blockwise", (2, 1, 1, 2, 2))])
def test_loss_and_every_gradient_equal_one_device_by_others(pattern, kernel, shape, params, truth, monkeypatch):
  monkeypatch.setitem(kernels.SIDE, "cpu", 7)
  monkeypatch.setattr(splash, "INTERPRET", True)
  n = TOKENS[shape[3]]
  made = compiled(on_mesh(shape), params, batch_of(n), pattern=pattern, kernel=kernel)
  assert_true(run(made, params, batch_of(n)), truth[n])


def test_all_factorisations_of_eight_devices_are_run():
  assert len(set(MESHES)) == 20 and all(np.prod(shape) == 8 for shape in MESHES) and set(FIRST) < set(MESHES)


class Two(nn.Module):
  """Two linear layers in a row, both with the hidden side split over tensor, as the layers of noise times are."""

  on: Mesh

  @nn.compact
  def __call__(self, x):
    return linear(64, "b", None, self.on, "out")(jnp.tanh(linear(16, "a", None, self.on, "out")(x)))


def test_batch_and_kernels_may_share_an_axis():
  """Sizes at which XLA (jax 0.10.2) returns wrong gradients when it is left to gather the kernels itself."""
  draw, on = np.random.default_rng(0), on_mesh((2, 2, 1, 1, 2))
  params = {"a": {"kernel": draw.normal(size=(16, 16)), "bias": draw.normal(size=16)},
            "b": {"kernel": draw.normal(size=(16, 64)), "bias": draw.normal(size=64)}}
  params, x = jax.tree.map(np.float32, (params, draw.normal(size=(8, 3, 16))))
  placed = placement.shardings([("kernel$", P(mesh.WEIGHTS, "tensor")), ("bias$", P())], params, on)
  step = jax.jit(jax.grad(lambda params, x: jnp.square(Two(on).apply({"params": params}, x)).mean()),
                 in_shardings=(placed, NamedSharding(on, P(mesh.BATCH))), out_shardings=placed)

  def plain(params, x):
    hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"])
    return jnp.square(hidden @ params["b"]["kernel"] + params["b"]["bias"]).mean()

  worst = jax.tree.map(apart, step(params, x), jax.grad(plain)(params, x))
  assert max(jax.tree.leaves(worst)) < 1e-5, worst


def test_a_vector_of_times_talks_and_weighs_as_one_time(params, truth):
  """As many collectives, as much temporary memory; here without padding, so without segments."""
  one, every = (compiled(on_mesh((2, 2, 1, 2, 1)), params, batch_of(16, times)) for times in (1, FRAMES))
  assert_true(run(every, params, batch_of(16)), truth[16])
  counts = [count_talk(step) for step in (one, every)]
  assert counts[0] == counts[1] and {"all-reduce", "all-gather", "collective-permute"} <= set(counts[0])
  memory = [step.memory_analysis().temp_size_in_bytes for step in (one, every)]
  assert memory[1] <= 1.05 * memory[0], memory


@pytest.mark.parametrize("name", [name for name in SIZES if name.startswith("wan")])
def test_every_published_parameter_has_a_place_and_what_is_big_is_split(name):
  size, on = SIZES[name], on_mesh((1, 2, 1, 2, 2))
  array = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  made = jax.eval_shape(WanDiT(size, mesh.build()).init, jax.random.key(0), array((1, 1, 2, 2, size.channels)),
                        array((1, 1)), array((1, 1, size.text_width)), array((1, 1, 2, 2, size.given)),
                        array((1, size.image_positions or 1, size.image_width)) if size.image_width else None)["params"]
  placed = placement.shardings(RULES + (IMAGE_RULES if size.image_width else []), made, on)
  share = sum(np.prod(sharding.shard_shape(leaf.shape))
              for leaf, sharding in zip(jax.tree.leaves(made), jax.tree.leaves(placed), strict=True))
  assert share < 0.255 * size.parameters()  # a quarter, and the little that is whole on every device


def test_rules_and_parameters_must_meet():
  tree, on = {"blocks": {"up": {"kernel": jnp.zeros((2, 4, 6)), "bias": jnp.zeros((2, 6))}}}, on_mesh((2, 2, 1, 2, 1))
  rules = [("kernel$", P(None, "fsdp", "tensor")), ("bias$", P())]
  placed = placement.shardings(rules, tree, on)
  assert placed["blocks"]["up"]["kernel"].spec == rules[0][1]
  with pytest.raises(ValueError, match=r"no placement rule meets the parameter blocks/up/bias \(2, 6\)"):
    placement.shardings(rules[:1], tree, on)
  with pytest.raises(ValueError, match="meet no parameter: \\['scale\\$'\\]"):
    placement.shardings([*rules, ("scale$", P())], tree, on)
  with pytest.raises(BadInput, match=r"blocks/up/kernel \(2, 4, 6\) cannot be split: 6 does not divide by .* = 4"):
    placement.shardings([("kernel$", P(None, None, ("fsdp", "seq"))), ("bias$", P())], tree, on)


def test_moments_and_averages_live_with_their_parameters(params):
  on = on_mesh((1, 2, 1, 2, 2))
  placed = placement.shardings(RULES + IMAGE_RULES, params, on)
  state = jax.eval_shape(lambda p: {"step": jnp.int32(0), "ema": p, "opt": optax.adamw(1e-3).init(p)}, params)
  where = placement.like(state, params, placed, on)
  moments = where["opt"][0]
  assert placed == where["ema"] == moments.mu == moments.nu
  assert where["step"].spec == moments.count.spec == P()
  assert placed["blocks"]["mlp"]["up"]["kernel"].spec == P(None, mesh.WEIGHTS, "tensor")


@pytest.mark.parametrize("seq", [1, 2, 4, 8])
def test_the_same_parameters_serve_every_grouping_of_the_devices(seq, params, built, truth):
  """Parameters go in and gradients come out as they lie for the whole mesh, and no more is gathered or sent for it."""
  base, n = on_mesh((1, 4, 1, 2, 1)), TOKENS[seq]
  on = mesh.view(base, seq)
  assert on.shape["seq"] == seq and on.shape["fsdp"] == 8 // seq
  rules = RULES + IMAGE_RULES
  placed, there = (placement.shardings(rules, params, one) for one in (base, on))
  assert all(a.is_equivalent_to(b, leaf.ndim) for a, b, leaf in
             zip(*map(jax.tree.leaves, (placed, there, params)), strict=True))
  made, batch = compiled(on, params, batch_of(n)), batch_of(n)
  given = jax.device_put(params, placed), jax.device_put(batch, made.input_shardings[0][1])
  assert_true(made(*given), truth[n])
  assert count_talk(made) == count_talk(built((1, 8 // seq, 1, seq, 1)))  # so from the start


def test_replicas_send_each_other_sums_of_shares():
  """Of a kernel split over 4 devices, a quarter of the gradient passes between two replicas."""
  def velocity(params, x, t, given, text):
    kernel = placement.hold(params["wide"], on, P())
    words = jnp.tanh(text @ kernel).mean((1, 2))
    return test_step.velocity(params, x, t, given, text) + words[:, None, None, None, None]

  base = mesh.build({"replica": 2, "fsdp": 4})
  on, draw = mesh.view(base, replicas=2), np.random.default_rng(0)
  assert on == base and mesh.view(base).shape["data"] == 2
  params = test_step.parameters() | {"wide": draw.normal(size=(4, 8192)).astype(np.float32)}
  placed = {name: NamedSharding(on, P(None, mesh.WEIGHTS) if name == "wide" else P()) for name in params}
  shares = partial(placement.hold_each, placed=placed)
  rows, method = test_step.batch_of(), test_step.few(velocity=velocity, replicas=2, shares=shares)
  split = {name: NamedSharding(on, P(mesh.ROWS)) for name in rows}
  run = jax.jit(partial(step.gradients, method, step=jnp.int32(3)), in_shardings=(placed, split),
                out_shardings=(placed, None))
  made = run.lower(params, rows).compile()
  one = jax.jit(partial(step.gradients, replace(method, replicas=1), step=jnp.int32(3)))(params, rows)
  test_step.assert_close(run(params, rows), one, 1e-5)
  between = Counter()
  for line in made.as_text().splitlines():
    if sent := traffic._sends(line):
      between[traffic._group(line)] += sent[1]
  share = 4 * 8192 * 4 / 4  # bytes
  assert share <= between[2] < 1.1 * share and between[8] < 0.1 * share, between


def test_a_grouping_that_does_not_divide_is_refused():
  with pytest.raises(BadInput, match="3 devices cannot share a clip: mesh fsdp x seq = 8 does not divide by 3"):
    mesh.view(on_mesh((1, 4, 1, 2, 1)), 3)


def test_host_batches_become_global_arrays_split_over_data_and_fsdp():
  batch = {"id": np.arange(8), "frames": np.arange(16).reshape(8, 2)}
  made = mesh.to_devices(on_mesh((2, 2, 1, 2, 1)), batch)
  for name, x in made.items():
    assert (np.asarray(x) == batch[name]).all() and x.sharding.shard_shape(x.shape)[0] == 2


@dataclass(frozen=True)
class Device:
  """One that is not here. GPUs of a machine are a slice to XLA."""

  platform: str
  id: int = 0
  process_index: int = 0

  @property
  def slice_index(self) -> int:
    return self.process_index


def devices(hosts):
  """GPUs, one on each of these hosts."""
  return [Device("gpu", n, host) for n, host in enumerate(hosts)]


@pytest.mark.parametrize("sizes", [{"fsdp": 16}, {"seq": 16}, {"data": 2, "fsdp": 4, "seq": 2}], ids=str)
def test_a_mesh_may_reach_over_machines_with_gpus(sizes):
  there = mesh.build(sizes, devices=devices([n // 8 for n in range(16)]))
  assert [device.id for device in there.devices.flat] == list(range(16))


@pytest.mark.parametrize(("hosts", "sizes", "parts"), [
  ([0, 0, 1, 1], {"fsdp": 4}, ([0, 1], 4)), ([0, 1, 0, 1], {"fsdp": 4}, ([0, 2], 4)),
  ([1, 1, 0, 0], {"data": 2, "tensor": 2}, ([1], 2)), ([0, 1, 0, 1], {"fsdp": 2, "seq": 2}, ([0, 1], 2)),
  ([0, 0, 1, 1, 2, 2, 3, 3], {"data": 2, "seq": 4}, ([0], 2)), ([0, 0, 1, 1], {"seq": 4}, ([0], 1))], ids=str)
def test_a_host_holds_the_parts_of_a_batch_that_its_devices_work_on(hosts, sizes, parts):
  assert mesh.held(mesh.build(sizes, devices=devices(hosts))) == parts


def test_hosts_that_would_hold_unequal_parts_are_refused():
  with pytest.raises(BadInput, match="hosts would hold 1 or 2 parts of a batch; choose axes that divide"):
    mesh.held(mesh.build({"data": 3, "seq": 2}, devices=devices([0, 0, 0, 0, 1, 1])))


def test_weights_stay_within_a_slice_of_tpus():
  """Two slices, whose devices come mixed: their replicas are whole, and fsdp over both is refused."""
  there = [SimpleNamespace(id=n, slice_index=n % 2, platform="cpu", device_kind="pod", process_index=0)
           for n in range(8)]
  for shape in ((2, 1, 4, 1, 1, 1), (1, 2, 1, 1, 4, 1), (2, 2, 2, 1, 1, 1)):
    rows = mesh.over_slices(shape, there).reshape(2, 4)
    assert [{device.slice_index for device in row} for row in rows] == [{0}, {1}]
  with pytest.raises(BadInput, match=r"over 2 slices of TPUs, .* make replica x data a multiple of 2"):
    mesh.over_slices((1, 1, 8, 1, 1, 1), there)


@pytest.mark.parametrize(("sizes", "count", "words"), [
  ({"date": 2}, None, "no mesh axis is named 'date': did you mean 'data'?"),
  ({"data": 3, "seq": 2}, None, "mesh data 3 x fsdp 1 x seq 2 x tensor 1 needs 6 devices and there are 8"),
  ({"data": 3, "seq": -1}, None, "needs 6 devices and there are 8"),
  ({"data": 2}, 4, "needs 2 devices and there are 4"),
  ({"data": -1, "seq": -1}, None, "at most one is -1"),
  ({"data": 0}, None, "sizes are positive"),
])
def test_impossible_meshes_are_refused_in_one_line(sizes, count, words):
  with pytest.raises(BadInput, match=re.escape(words)) as mistake:
    mesh.build(sizes, count)
  assert "\n" not in str(mistake.value)


def test_a_mesh_takes_what_is_left_and_describes_itself():
  built = mesh.build({"data": 2, "fsdp": -1})
  assert mesh.describe(built) == "data 2 x fsdp 4 x seq 1 x tensor 1 on 8 cpu devices"
  assert mesh.batch_shards(mesh.build({"data": 2, "fsdp": 2, "seq": 2})) == 4
  assert mesh.build().size == 1


@pytest.mark.parametrize(("shape", "pattern", "kernel", "heads", "dtype", "words"), [
  ((1, 1, 1, 2, 4), "ring", "dense", 6, "float32", "6 heads do not divide by mesh axis tensor = 4"),
  ((1, 4, 1, 2, 1), "full", "dense", 4, "float32", "pattern 'full' needs mesh axes clip x seq = 1, got 2: use 'ring'"),
  ((8, 1, 1, 1, 1), "rign", "dense", 4, "float32", "no attention pattern is named 'rign': did you mean 'ring'?"),
  ((8, 1, 1, 1, 1), "ring", "dens", 4, "float32", "no attention kernel is named 'dens': did you mean 'dense'?"),
])
def test_attention_that_cannot_run_is_refused_in_one_line(shape, pattern, kernel, heads, dtype, words):
  with pytest.raises(BadInput, match=re.escape(words)) as mistake:
    attention.check(pattern, kernel, on_mesh(shape), heads, dtype)
  assert "\n" not in str(mistake.value)
  attention.check("ring", "dense", on_mesh((1, 1, 1, 2, 4)), 8, "float32")


@dataclass(frozen=True)
class Card(Device):
  compute_capability: str = ""


@pytest.mark.parametrize(("capability", "runs"), [("9.0", True), ("8.0", True), ("7.5", False), ("gfx942", False)])
def test_cards_that_cudnn_does_not_know_are_refused_before_anything_is_compiled(capability, runs):
  there = mesh.build({}, devices=[Card("gpu", compute_capability=capability)])
  if runs:
    return attention.check("ring", "cudnn", there, 4, "bfloat16")
  with pytest.raises(BadInput, match="needs an NVIDIA card of compute capability 8 or more: use one of dense"):
    attention.check("ring", "cudnn", there, 4, "bfloat16")


def posing(platform: str) -> Mesh:
  return Mesh(np.array([Device(platform)]), ("data",))


@pytest.mark.parametrize(("platform", "variable", "given"), [
  ("gpu", "XLA_FLAGS", "--xla_gpu_experimental_parallel_collective_overlap_limit=1"),
  ("tpu", "LIBTPU_INIT_ARGS", "--xla_max_concurrent_async_collective_permutes=3 --xla_tpu_use_aggressive_scheduling")])
def test_what_the_environment_tells_the_compiler_stands(platform, variable, given, monkeypatch):
  told = mesh.compiler_options(posing(platform), 4)
  assert told.keys() == {part.strip("-").partition("=")[0] for part in given.split()}
  monkeypatch.setenv(variable, given)
  assert mesh.compiler_options(posing(platform), 4) == {} == mesh.compiler_options(mesh.build(), 4)


def test_this_xla_knows_what_cards_are_told():
  """XLA refuses a name that it does not know on any platform."""
  work = jax.jit(jnp.sin, compiler_options=mesh.compiler_options(posing("gpu"), 4))
  assert work(0.0) == 0
  with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
    jax.jit(jnp.sin, compiler_options={"xla_gpu_no_such_limit": 4})(0.0)
