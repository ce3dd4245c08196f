"""Devices and hosts become one named mesh; host batches become global arrays.

Axes: replica and data (copies of the weights; replicas sum their own gradients first, for slow links between them),
fsdp (batch split), clip (frames of a clip split), seq (tokens of a frame split), tensor (heads and MLP split). Any may
be 1. Weights are split over fsdp, clip and seq together, which is why the same devices may be grouped otherwise for
another bucket, and no parameter moves: see `view`. This is the only file that asks for devices.
"""

import math
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from anisora_jax.errors import BadInput, nearest

REPLICA = "replica"
AXES = (REPLICA, "data", "fsdp", "clip", "seq", "tensor")
BATCH = ("data", "fsdp")  # the axes that split a replica's part of a batch, and all of it where there is but one
ROWS = (REPLICA, *BATCH)  # those that split a whole batch
CLIP = ("clip", "seq")  # those that split the tokens of one clip
WEIGHTS = ("fsdp", *CLIP)  # those that split weights


def simulate(count: int) -> None:
  """Lets the CPU pose as `count` devices; called before the first use of a device."""
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", count)


def build(sizes: Mapping[str, int] | None = None, count: int | None = None, alone: bool = False,
          devices: Sequence | None = None) -> Mesh:
  """A mesh with the axes `AXES`.

  sizes: devices along each axis, 1 where unnamed; one may be -1 and takes what is left. count: how many of the devices
  to use, all by default (1 where no sizes are given). alone: of this host's devices, a mesh that no other host shares.
  devices: these and not those that are here, for programs that are compiled and not run (`targets`). Raises BadInput
  when the sizes do not multiply to the count.
  """
  sizes = dict(sizes or {})
  for name in sizes:
    if name not in AXES:
      raise BadInput(f"no mesh axis is named {name!r}: {nearest(name, AXES)}")
  if devices is None:
    devices = jax.local_devices() if alone else jax.devices()
  devices = devices[: count if sizes else count or 1]
  shape = [int(sizes.get(axis, 1)) for axis in AXES]
  if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
    raise BadInput(f"mesh {_text(shape)} is impossible: sizes are positive and at most one is -1 (takes what is left).")
  if -1 in shape:
    shape[shape.index(-1)] = max(1, len(devices) // math.prod(size for size in shape if size != -1))
  if math.prod(shape) != len(devices):
    raise BadInput(f"mesh {_text(shape)} needs {math.prod(shape)} devices and there are {len(devices)}: "
                   f"choose sizes whose product is {len(devices)}, or set one to -1.")
  types = (AxisType.Auto,) * len(AXES)
  if devices[0].platform != "tpu":  # they stand machine by machine, so that the last axes stay within one
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=types)
  if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
    return Mesh(over_slices(shape, devices), AXES, axis_types=types)
  try:
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
  except NotImplementedError:  # a torus of TPUs, no side or product of sides of which is as long as an axis
    split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(split, AXES, axis_types=types)


def over_slices(shape: Sequence[int], devices: Sequence) -> np.ndarray:
  """Devices of several slices of TPUs, of which each holds whole replicas: slow links join slices.

  Raises BadInput where weights would be split over slices.
  """
  slices = len({device.slice_index for device in devices})
  if shape[0] * shape[1] % slices:
    raise BadInput(f"mesh {_text(shape)} would split weights over {slices} slices of TPUs, which slow links join: make "
                   f"replica x data a multiple of {slices}.")
  replicas = math.gcd(shape[0], slices)
  across = [replicas, slices // replicas, *[1] * len(shape[2:])]
  within = [size // over for size, over in zip(shape, across, strict=True)]
  return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def view(mesh: Mesh, seq: int = 0, replicas: int = 1) -> Mesh:
  """The same devices in the same order, grouped otherwise.

  seq: devices that share the tokens of a frame, 0 for as many as now; what seq has less, fsdp has more. replicas: so
  many, and data has the rest. Weights lie as they lay, since replica x data and fsdp x clip x seq stay, so programs of
  several views work on the same parameters. Raises BadInput where fsdp x seq does not divide.
  """
  sizes = dict(mesh.shape)
  copies, both, seq = sizes[REPLICA] * sizes["data"], sizes["fsdp"] * sizes["seq"], seq or sizes["seq"]
  if both % seq:
    raise BadInput(f"{seq} devices cannot share a clip: mesh fsdp x seq = {both} does not divide by {seq}; choose a "
                   "divisor, or other mesh axes.")
  sizes |= {REPLICA: replicas, "data": copies // replicas, "fsdp": both // seq, "seq": seq}
  return Mesh(mesh.devices.reshape([sizes[axis] for axis in AXES]), AXES, axis_types=mesh.axis_types)


def _text(shape: Sequence[int]) -> str:
  return " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True)
                    if size != 1 or axis not in (REPLICA, "clip"))


def describe(mesh: Mesh) -> str:
  """One line for people: "data 2 x fsdp 2 x seq 2 x tensor 1 on 8 cpu devices"."""
  return f"{_text(list(mesh.shape.values()))} on {mesh.size} {mesh.devices.flat[0].platform} devices"


def device_kind(mesh: Mesh) -> str:
  """The hardware's own name, "cpu" or "NVIDIA H200"."""
  return mesh.devices.flat[0].device_kind


def compiler_options(mesh: Mesh, transfers: int) -> dict[str, bool | int]:
  """What XLA is told, through `jax.jit`, so that so many transfers to neighbours are under way while kernels work.

  By default it lets cards have one, and starts those of TPUs late, where it does not know what a kernel costs. Options
  that XLA_FLAGS or LIBTPU_INIT_ARGS name are left to them.
  """
  told = {
    "gpu": {"xla_gpu_experimental_parallel_collective_overlap_limit": transfers},
    "tpu": {"xla_tpu_use_aggressive_scheduling": True, "xla_max_concurrent_async_collective_permutes": transfers},
  }.get(mesh.devices.flat[0].platform, {})
  named = os.environ.get("XLA_FLAGS", "") + os.environ.get("LIBTPU_INIT_ARGS", "")
  return {name: value for name, value in told.items() if name not in named}


def clip_shards(mesh: Mesh) -> int:
  """Over how many devices a clip's tokens are split."""
  return math.prod(mesh.shape[axis] for axis in CLIP)


def batch_shards(mesh: Mesh) -> int:
  """Into how many parts a batch is split; a global batch is a multiple of it."""
  return math.prod(mesh.shape[axis] for axis in ROWS)


def leads() -> bool:
  """Whether this process writes logs, films and manifests."""
  return jax.process_index() == 0


def held(mesh: Mesh) -> tuple[list[int], int]:
  """(which parts of a batch this host's devices hold, into how many replica x data x fsdp split it).

  Where clip, seq or tensor reach over hosts, several hold the same ones, and each loads them. Raises BadInput where
  hosts do not hold equally many.
  """
  found: dict[int, list[int]] = {}
  for number, devices in enumerate(mesh.devices.reshape(batch_shards(mesh), -1)):
    for host in {device.process_index for device in devices}:
      found.setdefault(host, []).append(number)
  counts = sorted({len(parts) for parts in found.values()})
  if len(counts) > 1:
    raise BadInput(f"mesh {describe(mesh)}: hosts would hold {' or '.join(map(str, counts))} parts of a batch; choose "
                   "axes that divide by the devices of a host, or are divisors of them.")
  return found[jax.process_index()], batch_shards(mesh)


def to_devices(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """Joins the parts that each host holds, in their order, `[b, ...]`, to global arrays split as a batch is."""
  split, (own, parts) = NamedSharding(mesh, P(ROWS)), held(mesh)

  def joined(x: np.ndarray) -> jax.Array:
    rows = len(x) // len(own)  # of a part
    here = {part * rows: x[at * rows:(at + 1) * rows] for at, part in enumerate(own)}
    return jax.make_array_from_callback((parts * rows, *x.shape[1:]), split, lambda index: here[index[0].start or 0])

  return {name: joined(x) for name, x in batch.items()}


def from_devices(x: jax.Array) -> np.ndarray:
  """Of a global array that is split as a batch is, the parts that this host holds, in their order."""
  found = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  return np.concatenate([np.asarray(found[first]) for first in sorted(found)])


def gather(mesh: Mesh, rows: np.ndarray) -> np.ndarray:
  """The int64 rows `[b, ...]` of all hosts, as `to_devices` joins them, on each."""
  halves = np.ascontiguousarray(rows, np.int64)[..., None].view(np.uint32)  # devices know no int64
  joined = multihost_utils.process_allgather(to_devices(mesh, {"": halves})[""], tiled=True)
  return np.ascontiguousarray(joined).view(np.int64)[..., 0]


def alike(number: int) -> bool:
  """Whether all hosts say the same number of 32 bits. Each asks."""
  return jax.process_count() == 1 or len(set(multihost_utils.process_allgather(np.uint32(number)).tolist())) == 1


def whole(mesh: Mesh) -> NamedSharding:
  """The placement of what every device holds whole, and every host can therefore read."""
  return NamedSharding(mesh, P())


def everywhere(mesh: Mesh, x: np.ndarray) -> jax.Array:
  """An array that every host holds, whole on every device."""
  return jax.device_put(x, whole(mesh))


def tell_all(mesh: Mesh, flag: int) -> jax.Array:
  """One number of each host, on each of its devices: the maximum inside a step is the same on every host.

  Split over all axes: a copy that several hosts share would be taken for equal without looking.
  """
  split = NamedSharding(mesh, P(mesh.axis_names))
  return jax.make_array_from_callback((mesh.size,), split, lambda _: np.full(1, flag, np.int32))
