"""A whole small run for the tests of loop and checkpoints: toy_run.py WORKDIR STEPS DEVICES SECONDS [RANK PORT].

Fits a linear map, sharded over a mesh, with the project's own optimiser, state, loop, report and checkpoints. SECONDS
is how long its loader takes for a batch, so that a signal can be sent in between. With RANK it is one of two hosts
with DEVICES each, which meet at PORT.
"""

import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

if __name__ == "__main__":
  sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from anisora_jax import errors
from anisora_jax.checkpoints import workdir
from anisora_jax.checkpoints.orbax import Checkpoints
from anisora_jax.parallel import mesh as meshes
from anisora_jax.training import loop, optimizer, report, state
from anisora_jax.training.stop import Stop

BATCH, WIDTH = 8, 16


class Numbers:
  """A loader whose batch is a function of its position; each host gets its share."""

  def __init__(self, seconds: float = 0.0):
    self.position, self.seconds = {"global_next_index": 0}, seconds

  def __next__(self) -> dict:
    time.sleep(self.seconds)
    first = self.position["global_next_index"]
    self.position = {"global_next_index": first + BATCH}
    inputs = np.random.default_rng(first).standard_normal((BATCH, WIDTH), np.float32)
    share = np.split(np.arange(BATCH), jax.process_count())[jax.process_index()]
    return {"inputs": inputs[share], "id": first + share, "caption": [""] * len(share)}


def mesh_of(devices: int) -> jax.sharding.Mesh:
  return jax.make_mesh((2, devices // 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2,
                       devices=jax.devices()[:devices])


def placements(tree, mesh):
  """Matrices split over both axes, all else on every device; with a bf16 leaf, as a state may have one."""
  return jax.tree.map(lambda x: NamedSharding(mesh, P("fsdp", "data") if x.ndim == 2 else P()), tree)


OPTIMIZER, RATE = optimizer.build(optimizer.Optimizer(rate=0.05, warmup=3), {"kernel": 0, "bias": 0, "small": 0})


def begin(seed: int = 0) -> state.TrainState:
  kernel = jax.random.normal(jax.random.key(seed), (WIDTH, WIDTH)) / 4
  return state.create({"kernel": kernel, "bias": jnp.zeros(WIDTH), "small": jnp.full((4, 4), 1 / 3, jnp.bfloat16)},
                      OPTIMIZER)


def placed(mesh, seed: int = 0) -> state.TrainState:
  made = begin(seed)
  return jax.device_put(made, placements(made, mesh))


def abstract(mesh) -> state.TrainState:
  shapes = jax.eval_shape(begin)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placements(shapes, mesh))


@partial(jax.jit, donate_argnums=0)
def step(now: state.TrainState, batch: dict) -> tuple[state.TrainState, dict]:
  noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), now.step), batch["inputs"].shape)
  def loss_of(params):
    made = batch["inputs"] @ params["kernel"] + params["bias"] + jnp.sum(params["small"])
    return jnp.mean((made - jnp.roll(batch["inputs"], 1, axis=-1) - 0.1 * noise) ** 2)
  loss, gradients = jax.value_and_grad(loss_of)(now.params)
  updates, opt = OPTIMIZER.update(gradients, now.opt, now.params)
  params = optax.apply_updates(now.params, updates)
  new = state.TrainState(now.step + 1, params, optimizer.ema(now.ema, params, now.step), opt)
  fine = jnp.isfinite(loss)
  new = jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, now.replace(step=new.step))
  return new, {"loss": loss, "skipped": (~fine).astype(jnp.int32), "stop": jnp.max(batch["stop"])}


def place(mesh, batch: dict) -> dict:
  inputs = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), batch["inputs"])
  # One number a device, over every axis: were it placed like the batch, hosts that share their samples would each see
  # a stop of their own, and leave each other behind.
  stop = jax.make_array_from_callback((mesh.size,), NamedSharding(mesh, P(mesh.axis_names)),
                                      lambda _: batch["stop"][:1])
  return {"inputs": inputs, "stop": stop}


def train(folder: Path, steps: int, devices: int, seconds: float) -> None:
  mesh, numbers, leads = mesh_of(devices), Numbers(seconds), jax.process_index() == 0
  alone = workdir.lock(folder) if leads else nullcontext()
  with Stop() as stop, alone, Checkpoints(folder / "checkpoints", keep=2) as checkpoints:
    if leads:
      workdir.keep_config(folder, {"steps": steps, "devices": devices}, ["*"])
    if checkpoints.steps():
      _, now, numbers.position = checkpoints.restore(abstract(mesh))
    else:
      now = placed(mesh)
    print("ready", flush=True)
    with report.Report(folder, int(now.step), steps, leads) as measures:
      effects = loop.Effects(
        place=partial(place, mesh), rate=lambda number: float(RATE(number - 1)), work=lambda batch: (BATCH, 1e3),
        held_out=lambda now: {"held_out": 1.0},
        save=lambda number, now, position: checkpoints.save(number, now, position, {}),
        ids=lambda batch: multihost_utils.process_allgather(batch["id"].astype(np.int32), tiled=True),
        wait=checkpoints.wait, report=measures, say=measures.say)
      _, number, stopped = loop.run(now, step, numbers, loop.Due(steps, report=1, checkpoint=4), effects, stop,
                                    report.Clock())
  print(f"{'stopped' if stopped else 'finished'} at {number}", flush=True)


def main() -> None:
  folder, steps, devices, seconds, *host = sys.argv[1:]
  meshes.simulate(int(devices))
  if host:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # or it would take SIGTERM
    jax.distributed.initialize(f"localhost:{host[1]}", 2, int(host[0]))
  train(Path(folder), int(steps), int(devices) * jax.process_count(), float(seconds))


if __name__ == "__main__":
  sys.exit(errors.run(main))
