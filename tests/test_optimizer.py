"""The optimiser is torch's AdamW step by step; rates and averages are their closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from anisora_jax.errors import BadInput
from anisora_jax.training import optimizer, state
from anisora_jax.training.optimizer import Optimizer

SHAPES = {"block": {"q": {"kernel": (5, 4), "bias": (4,)}, "norm": {"scale": (5,)}, "modulation": (1, 6, 5)},
          "text": {"kernel": (3, 5)}}


def draw(seed, scale=1.0):
  numbers = np.random.default_rng(seed)
  return jax.tree.map(lambda shape: (scale * numbers.standard_normal(shape)).astype(np.float32), SHAPES,
                      is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize("clip", [1.0, 6.0, math.inf])
@pytest.mark.parametrize("schedule", optimizer.SCHEDULES)
def test_twenty_steps_equal_torch_adamw(clip, schedule):
  options = Optimizer(rate=3e-3, warmup=4, steps=20, schedule=schedule, final=0.1, decay=0.3, clip=clip)
  params = draw(0, scale=0.1)  # as weights are
  chain, rate = optimizer.build(options, params)
  opt, update = chain.init(params), jax.jit(chain.update)

  theirs = jax.tree.map(lambda x: torch.nn.Parameter(torch.tensor(x)), params)
  decays = [theirs["block"]["q"]["kernel"], theirs["text"]["kernel"]]
  others = [theirs["block"]["q"]["bias"], theirs["block"]["norm"]["scale"], theirs["block"]["modulation"]]
  adamw = torch.optim.AdamW([{"params": decays, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}],
                            betas=(0.9, 0.95), eps=1e-8)
  norms = []
  for n in range(20):
    gradients = draw(100 + n, scale=0.3 + 0.1 * n)  # norms on both sides of 6
    updates, opt = update(gradients, opt, params)
    params = optax.apply_updates(params, updates)
    for theirs_leaf, gradient in zip(jax.tree.leaves(theirs), jax.tree.leaves(gradients), strict=True):
      theirs_leaf.grad = torch.tensor(gradient)
    norms.append(float(torch.nn.utils.clip_grad_norm_(jax.tree.leaves(theirs), clip)))
    for group in adamw.param_groups:
      group["lr"] = float(rate(n))
    adamw.step()
    for ours, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(theirs), strict=True):
      # 1e-6: f32, and torch divides by its norm + 1e-6.
      np.testing.assert_allclose(ours, leaf.detach().numpy(), rtol=0, atol=1e-6)
  assert min(norms) < 6 < max(norms)


def test_rates_are_their_closed_forms():
  cosine = optimizer.rate_of(Optimizer(rate=2e-4, warmup=10, steps=110, schedule="cosine", final=0.1))
  constant = optimizer.rate_of(Optimizer(rate=2e-4, warmup=10))
  wsd = optimizer.rate_of(Optimizer(rate=2e-4, warmup=10, steps=110, schedule="wsd", final=0.1, cooldown=0.5))
  for n in (0, 3, 9, 10, 35, 60, 109, 110, 500):
    done = min(max((n - 10) / 100, 0), 1)
    warm = 2e-4 * min((n + 1) / 10, 1)
    np.testing.assert_allclose(constant(jnp.int32(n)), warm, rtol=1e-6)
    np.testing.assert_allclose(cosine(n), warm * (0.1 + 0.9 * math.cos(math.pi * done / 2) ** 2), rtol=1e-6)
    np.testing.assert_allclose(wsd(n), warm * np.interp(n, [55, 110], [1, 0.1]), rtol=1e-6)
  assert float(optimizer.rate_of(Optimizer(rate=1.0))(0)) == 1.0


def test_frozen_parts_stay_have_no_moments_and_do_not_count_in_the_norm():
  options = {"rate": 0.1, "decay": 0.5, "clip": 1.0}
  params, gradients = draw(0), draw(1)
  chain, _ = optimizer.build(Optimizer(**options, frozen=r"^text/"), params)
  opt = chain.init(params)
  updates, _ = chain.update(gradients | {"text": {"kernel": np.full((3, 5), 1e9, np.float32)}}, opt, params)
  assert not updates["text"]["kernel"].any()
  # The rest moves as if the frozen part did not exist.
  alone, _ = optimizer.build(Optimizer(**options), {"block": params["block"]})
  expected, _ = alone.update({"block": gradients["block"]}, alone.init({"block": params["block"]}),
                             {"block": params["block"]})
  jax.tree.map(np.testing.assert_array_equal, updates["block"], expected["block"])
  moments = sum(leaf.size for leaf in jax.tree.leaves(opt))
  assert moments == sum(leaf.size for leaf in jax.tree.leaves(alone.init({"block": params["block"]})))


def test_the_average_is_its_closed_form():
  params = [np.random.default_rng(n).standard_normal(7).astype(np.float32) for n in range(40)]
  average, decays = {"x": params[0]}, [min(0.7, (1 + n) / (10 + n)) for n in range(40)]
  assert 0.7 in decays and decays[0] == 0.1
  for n in range(40):
    average = jax.jit(optimizer.ema, static_argnums=3)(average, {"x": params[n]}, jnp.int32(n), 0.7)
  weights = [(1 - decays[n]) * math.prod(decays[n + 1:]) for n in range(40)]
  expected = math.prod(decays) * np.float64(params[0]) + sum(w * np.float64(p) for w, p in zip(weights, params,
                                                                                               strict=True))
  np.testing.assert_allclose(average["x"], expected, atol=1e-6)
  low = optimizer.ema({"x": jnp.ones(2, jnp.bfloat16)}, {"x": jnp.zeros(2, jnp.bfloat16)}, jnp.int32(0))
  assert low["x"].dtype == jnp.bfloat16


def test_a_new_state_may_be_donated():
  params = jax.tree.map(jnp.asarray, draw(0))
  made = state.create(params, optimizer.build(Optimizer(), params)[0])
  assert made.step.dtype == jnp.int32 and int(made.step) == 0
  buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(made)]
  assert len(set(buffers)) == len(buffers)


@pytest.mark.parametrize("wrong, said", [
  ({"rate": 0.0}, "optimizer.rate is 0.0: it must be above 0"),
  ({"rate": math.nan}, "optimizer.rate is nan"),
  ({"warmup": -1}, "optimizer.warmup is -1: it must be 0 or more"),
  ({"schedule": "cosin"}, "no schedule is named 'cosin': did you mean 'cosine'?"),
  ({"schedule": "cosine", "warmup": 10, "steps": 10}, "optimizer.warmup is 10 of 10 steps"),
  ({"schedule": "wsd", "cooldown": 0.0}, "optimizer.cooldown is 0.0: it must be above 0, at most 1"),
  ({"b2": 1.0}, "optimizer.b2 is 1.0"),
  ({"clip": 0.0}, "optimizer.clip is 0.0"),
  ({"decay": -1.0}, "optimizer.decay is -1.0"),
  ({"ema": 2.0}, "optimizer.ema is 2.0: it must be 0 .. 1"),
  ({"ema": -1.0}, "optimizer.ema is -1.0: it must be 0 .. 1"),
  ({"frozen": "("}, "optimizer.frozen is '(', which is no regular expression"),
  ({"frozen": "txt"}, "optimizer.frozen is 'txt', which meets no parameter"),
  ({"frozen": "."}, "optimizer.frozen is '.', which meets every parameter"),
])
def test_nonsense_is_refused_in_one_line(wrong, said):
  with pytest.raises(BadInput) as caught:
    optimizer.build(Optimizer(**wrong), draw(0))
  assert said in str(caught.value) and "\n" not in str(caught.value)
