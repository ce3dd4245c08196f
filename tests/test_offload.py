"""What lives in the host's memory: it changes where arrays are and how long they stay, and no number."""

import math
from dataclasses import replace
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import FEW_TASKS

from anisora_jax.checkpoints.orbax import Checkpoints
from anisora_jax.errors import BadInput
from anisora_jax.experiment import parts, train
from anisora_jax.models.remat import REMAT
from anisora_jax.models.wan.dit import WanDiT
from anisora_jax.models.wan.sizes import SIZES, Size
from anisora_jax.parallel import mesh as meshes
from anisora_jax.parallel import offload, targets
from anisora_jax.training import optimizer
from configs import tiny

SIZE = Size(layers=2, width=32, heads=4, mlp=64, channels=4, text_width=8, text_tokens=6)
B, F, H, W = 4, 3, 4, 8  # a frame has 8 tokens
SPLIT = {"fsdp": 2, "seq": 4}


def gradient(axes: dict[str, int], remat: str):
  """((params) -> loss and gradients, params), for one network and batch."""
  net = WanDiT(SIZE, meshes.build(axes, count=math.prod(axes.values())), "ring", "blockwise", remat)
  draw = np.random.default_rng(0)
  x, target = jnp.asarray(draw.standard_normal((2, B, F, H, W, 4), np.float32))
  text, t = (jnp.asarray(draw.uniform(size=shape), jnp.float32) for shape in ((B, 6, 8), (B, F)))
  shapes = jax.eval_shape(net.init, jax.random.key(0), x, t, text)["params"]
  params = jax.tree.map(lambda leaf: draw.standard_normal(leaf.shape, np.float32) * 0.1, shapes)
  return jax.jit(jax.value_and_grad(lambda params: jnp.square(net.apply({"params": params}, x, t, text) - target)
                                    .mean())), params


def sent_to_host(jaxpr, turns: int = 1) -> int:
  """Bytes that a traced program of one device puts into its host's memory, loops multiplied out."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "device_put":
      total += sum(turns * out.aval.size * out.aval.dtype.itemsize for out in equation.outvars
                   if "host" in str(out.aval.memory_space).lower())
    inner = turns * equation.params["length"] if equation.primitive.name == "scan" else turns
    for value in jax.tree.leaves(dict(equation.params), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
      value = getattr(value, "jaxpr", value)
      total += sent_to_host(value, inner) if hasattr(value, "eqns") else 0
  return total


def test_each_policy_sends_the_host_what_it_names():
  stream = SIZE.layers * B * F * H * W // 4 * SIZE.width * 4  # in f32; attention gives as much, and a sum for each head
  sums = stream // SIZE.head_width
  for name, size in (("attention", 0), ("full", 0), ("attention_offload", stream + sums), ("full_offload", stream),
                     ("offload", 2 * stream + sums)):
    work, params = gradient({"fsdp": 1}, name)
    assert sent_to_host(work.trace(params).jaxpr) == size, name


def test_where_activations_wait_changes_no_gradient_on_a_mesh():
  (loss, grads), *others = (work.lower(params).compile()(params) for work, params in (
    gradient(SPLIT, name) for name in ("attention", "offload")))
  for other, found in others:
    assert loss == other
    jax.tree.map(np.testing.assert_array_equal, grads, found)


class Training:
  """The tiny recipe on eight devices, with random clips."""

  def __init__(self, **optimizer_fields):
    self.config = tiny.get_config()
    self.config.model.size = "mite"
    self.config.update({"mesh": {"fsdp": 4, "seq": 2}, "data": {"buckets": "3x8x16@8"}, "tasks": FEW_TASKS,
                        "optimizer": optimizer_fields})
    with patch.dict(SIZES, mite=replace(SIZE, channels=12, given=13, text_width=64)):
      self.parts = parts.assemble(self.config)
    chain, _ = optimizer.build(self.parts.optimizer, parts.abstract_trained(self.parts))
    self.abstract, self.make = train.training_state(self.parts, chain)
    self.batch = train.abstract_batch(self.parts, self.parts.buckets[0])
    self.frozen = train.abstract_frozen(self.parts, self.config)
    step = train.compiled_step(self.parts, chain, self.abstract)
    self.step = step.lower(self.abstract, self.batch, self.frozen).compile()

  def go(self, state, first: int, steps: int):
    """(state, losses) after so many steps."""
    losses, blank = [], jnp.zeros(self.frozen.blank.shape)
    for number in range(first, first + steps):
      draw = np.random.default_rng(number)
      batch = {name: draw.integers(0, 256, x.shape).astype(x.dtype) if name == "frames" else
               np.zeros(x.shape, x.dtype) + (name == "ok") for name, x in self.batch.items()}
      batch = {name: jax.device_put(x, self.batch[name].sharding) for name, x in batch.items()}
      state, measures = self.step(state, batch, self.frozen.replace(blank=blank))
      losses.append(float(measures["loss"]))
    return state, losses


def memories(tree) -> set[str]:
  return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


@pytest.fixture(scope="module")
def trainings():
  return Training(warmup=1, rate=1e-2), Training(warmup=1, rate=1e-2, offload=True)


def test_moments_on_the_host_train_the_same(trainings):
  (state, losses), (other, found) = (training.go(training.make(None), 0, 3) for training in trainings)
  assert losses == found
  jax.tree.map(np.testing.assert_array_equal, state, other)
  assert memories((other.opt, other.ema)) == {offload.HOST}
  assert memories(other.params) == memories(state) == {offload.DEVICE}
  assert memories(offload.on_device(other)) == {offload.DEVICE}


@pytest.mark.parametrize("begun", [0, 1], ids=["on the device", "on the host"])
def test_a_run_resumes_with_its_moments_elsewhere(trainings, begun, tmp_path):
  one, other = trainings[begun], trainings[1 - begun]
  state, _ = one.go(one.make(None), 0, 1)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {}, {})
    want = one.go(state, 1, 1)
    checkpoints.wait()
    _, state, _ = checkpoints.restore(other.abstract)
  assert memories(state.opt) == memories(other.abstract.opt)
  got = other.go(state, 1, 1)
  jax.tree.map(np.testing.assert_array_equal, want, got)


def test_the_host_holds_two_moments_and_the_average(trainings):
  here, there = trainings
  aside = sum(targets.held(x) for x in jax.tree.leaves(there.abstract) if x.sharding.memory_kind == offload.HOST)
  assert aside == 3 * sum(map(targets.held, jax.tree.leaves(there.abstract.params)))
  kept, _, host = targets.memory(there.step, there.parts.mesh, aside)
  assert host == aside and kept + host == targets.memory(here.step, here.parts.mesh)[0]


@pytest.mark.parametrize("fields", [{"model": {"remat": name}} for name in REMAT if "offload" in name]
                         + [{"optimizer": {"offload": True}}], ids=str)
def test_a_device_that_does_not_reach_its_hosts_memory_is_refused(fields, monkeypatch):
  monkeypatch.setattr(offload, "kinds", lambda device: ["device"])
  field = next(iter(fields.values()))
  config = tiny.get_config()
  config.update(fields)
  with pytest.raises(BadInput, match=f"{next(iter(field))}.* does not reach .it has device.: take "):
    parts.assemble(config)
