"""The memory that formulas tell, against what XLA takes when it compiles."""

import math
from dataclasses import replace
from unittest.mock import patch

import jax
import jax.numpy as jnp
import pytest
from drawn import FEW_TASKS

from anisora_jax.experiment import parts, train
from anisora_jax.models.remat import REMAT
from anisora_jax.models.wan.dit import WanDiT
from anisora_jax.models.wan.sizes import SIZES, Size
from anisora_jax.parallel import mesh as meshes
from anisora_jax.parallel import targets
from anisora_jax.planning import memory
from anisora_jax.training import optimizer
from configs import tiny

SIZE = Size(layers=4, width=64, heads=2, mlp=128, channels=4, text_width=8, text_tokens=6)
F, N = 6, 256  # frames, and tokens of each


def temporary(layers: int, remat: str) -> int:
  """Bytes that the gradient of a network takes beside what goes in and comes out."""
  net = WanDiT(replace(SIZE, layers=layers), meshes.build(), "ring", "blockwise", remat)
  given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, F, 32, 32, 4), (1, F), (1, 6, 8))]
  params = jax.eval_shape(net.init, jax.random.key(0), *given)["params"]
  work = jax.jit(jax.grad(lambda params, *given: net.apply({"params": params}, *given).sum()))
  return work.lower(params, *given).compile().memory_analysis().temp_size_in_bytes


def work(layers: int, **fields) -> memory.Work:
  fields = {"remat": "attention", "kernel": "blockwise", "platform": "cpu"} | fields
  return memory.Work(replace(SIZE, layers=layers), F * N, F * N, 4, **fields)


@pytest.mark.parametrize("remat", ["full", "attention", "matmuls"])
def test_a_layer_keeps_what_its_policy_says(remat):
  """Memory grows with the layers by what each of them keeps, and by nothing else."""
  grown = (temporary(12, remat) - temporary(4, remat)) / 8
  assert memory.saved(work(1, remat=remat)) == pytest.approx(grown, rel=0.02)


def training(fsdp: int = 2, clip: int = 1, rest: int = 2, bucket: str = "3x8x16@8",
             **model) -> tuple[parts.Parts, train.ConfigDict]:
  """rest: of seq and of tensor."""
  config = tiny.get_config()
  config.update({"mesh": {"fsdp": fsdp, "clip": clip, "seq": rest, "tensor": rest}, "data": {"buckets": bucket},
                 "model": {"size": "mite", **model}, "tasks": FEW_TASKS})
  with patch.dict(SIZES, mite=replace(SIZE, layers=2, channels=12, given=13, text_width=64)):
    return parts.assemble(config, fsdp * clip * rest * rest), config


def measured(made: parts.Parts, config: train.ConfigDict) -> tuple[int, int]:
  """Bytes kept and worked by the compiled step."""
  chain, _ = optimizer.build(made.optimizer, parts.abstract_trained(made))
  state, _ = train.training_state(made, chain)
  given = state, train.abstract_batch(made, made.buckets[0]), train.abstract_frozen(made, config)
  program = train.compiled_step(made, chain, state).lower(*given).compile()
  return targets.memory(program, made.mesh)[:2]


def test_what_is_kept_is_told_to_the_byte():
  made, config = training()
  told = train.estimated(made, config, made.buckets[0])
  assert sum(told.kept.values()) == measured(made, config)[0]


def test_what_a_local_pattern_gathers_is_told():
  """Of one frame on each of four devices, with a window of none and of all."""
  told, found = [], []
  for window in (0, 3):
    made, config = training(1, 4, 1, "4x64x128@1", attention="local_global", mask=f"window:{window}", remat="full",
                            kernel="blockwise")
    told.append(sum(train.estimated(made, config, made.buckets[0]).worked.values()))
    found.append(measured(made, config)[1])
  assert told == pytest.approx(found, rel=0.2) and told[1] - told[0] == pytest.approx(found[1] - found[0], rel=0.1)


def test_frames_for_all_are_gathered_beside_a_window():
  told = []
  for mask in ("window:1", "window:1+globals:4", "causal+window:1"):
    made, config = training(1, 4, 1, "8x8x16@1", attention="local_global", mask=mask)
    told.append(train.estimated(made, config, made.buckets[0]).worked["one layer"])
  frame = 2 * (4 + 4) * made.frame_tokens(made.buckets[0])[1] * made.size.width
  assert told[1] - told[0] >= 4 * frame and told[0] - told[2] >= frame


def test_moments_on_the_host_leave_the_device_and_nothing_is_lost():
  made, config = training()
  here, there = (train.estimated(replace(made, offload=aside), config, made.buckets[0]) for aside in (False, True))
  assert there.host == here.kept["moments"] + here.kept["average"] and here.host == 0
  assert sum(there.kept.values()) + there.host == sum(here.kept.values())


def test_each_policy_has_a_formula_and_what_leaves_the_device_is_on_its_host():
  assert memory.SAVED.keys() == REMAT.keys()
  for name, same in (("attention_offload", "attention"), ("full_offload", "full"), ("offload", "attention")):
    moved, stays = work(4, remat=name), work(4, remat=same)
    assert memory.saved(moved) + memory.on_host(moved) == memory.saved(stays)
    assert memory.on_host(moved) > memory.on_host(stays) == 0


def test_logits_of_dense_attention_grow_with_the_square_and_those_of_tiles_do_not():
  dense, tiles = ([memory.logits(replace(work(2, kernel=kernel), tokens=l, keys=l)) for l in (1000, 10_000, 100_000)]
                  for kernel in ("dense", "blockwise"))
  assert dense[1] == 100 * dense[0] and tiles[1] == tiles[2] < dense[1]


def test_a_dry_run_tells_it_at_once(capsys):
  made, config = training()
  with patch.dict(SIZES, mite=made.size):
    train.dry_run(config, compiled=False)
  lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
  total = math.fsum(train.estimated(made, config, made.buckets[0]).worked.values())
  assert lines["estimate"].startswith(f"{(train.estimated(made, config, made.buckets[0]).total) / 2**20:.1f} MiB")
  assert total > 0 and "gradients" in lines["estimate"] and "memory of a device" not in lines["bucket"]
