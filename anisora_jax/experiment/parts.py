"""A config becomes parts: mesh, codec, network, method. Impossible combinations are refused before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree
from ml_collections import ConfigDict

from anisora_jax import keys
from anisora_jax.adapters import lora
from anisora_jax.diffusion.objective import WEIGHTS
from anisora_jax.diffusion.times import TimeDraw
from anisora_jax.errors import BadInput, pick
from anisora_jax.experiment import encoders
from anisora_jax.experiment.encoders import DTYPES, Captions
from anisora_jax.loaders import mixture
from anisora_jax.loaders.assign import Deal
from anisora_jax.loaders.buckets import Bucket, parse
from anisora_jax.models import attention, codec, remat
from anisora_jax.models.wan import placement as wan_placement
from anisora_jax.models.wan.dit import WanDiT
from anisora_jax.models.wan.sizes import SIZES, Size
from anisora_jax.parallel import mesh as meshes
from anisora_jax.parallel import offload, placement, sight
from anisora_jax.tasks.masks import Mixture
from anisora_jax.training import optimizer, step


@dataclass(frozen=True)
class Parts:
  """What a config describes, made and checked.

  mesh: of a bucket, or of none, and then with the replicas as data. codec: without its parameters. image_tokens: that
  the network reads of pictures. encoded: records hold latents. packed: of `Deal`.
  offload: moments and averages of what is trained live in the host's memory.
  """

  mesh: jax.sharding.Mesh
  replicas: int
  size: Size
  codec: codec.Codec
  network: WanDiT
  method: step.Method
  optimizer: optimizer.Optimizer
  lora: lora.Lora | None
  buckets: tuple[Bucket, ...]
  image_tokens: int
  encoded: bool
  packed: int
  offload: bool

  def of(self, bucket: Bucket) -> "Parts":
    """The same with the devices grouped as a bucket asks; parameters stay where they are."""
    mesh = meshes.view(self.mesh, bucket.seq, self.replicas)
    network = self.network.clone(mesh=mesh)
    method = replace(self.method, velocity=partial(velocity, network, self.lora.scale if self.lora else 1.0),
                     replicas=self.replicas)
    return replace(self, mesh=mesh, network=network, method=method)

  def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
    return codec.latent_shape(self.codec, bucket.frames, bucket.height, bucket.width, self.size.patch)

  def frame_tokens(self, bucket: Bucket) -> tuple[int, int]:
    """(frames, tokens of a frame) of a bucket's clips."""
    f, h, w = self.latent_shape(bucket)
    return f, h * w // self.size.patch**2

  def work(self, bucket: Bucket) -> tuple[int, float]:
    """(tokens, model FLOPs) of one training step. Nothing counts twice.

    The backward pass counts twice the forward; beside adapters, products with frozen kernels count once.
    """
    f, n = self.frame_tokens(bucket)
    seen = sight.parse(self.network.mask, f).share(f)
    one, attention = (count(f, n, self.image_tokens, seen)
                      for count in (self.size.forward_flops, self.size.attention_flops))
    return bucket.batch * f * n, bucket.batch * (2 * one + attention if self.lora else 3 * one)

  @property
  def compiler_options(self) -> dict[str, bool | int]:
    """Of programs that work the network, for `jax.jit`."""
    pattern = attention.PATTERNS[self.network.pattern]
    devices, together = pattern.split(self.mesh, self.size.heads)
    return meshes.compiler_options(self.mesh, pattern.transfers) if together < devices else {}


def velocity(network: WanDiT, scale: float, params: PyTree, x, t, condition, text):
  """The network as training and sampling call it. scale: of adapters that stand beside its parameters, if any do."""
  told = condition.channels() if network.size.given else None
  return network.apply({"params": lora.scaled(params, scale)}, x, t, text, told, condition.image,
                       condition.segment)


def assemble(config: ConfigDict, count: int | None = None, devices: Sequence[jax.Device] | None = None) -> Parts:
  """Makes the parts. count: devices to use, all by default; devices: which. Raises BadInput for what cannot work."""
  built = meshes.build(config.mesh.to_dict(), count, devices=devices)
  mesh = meshes.view(built)
  size = pick(SIZES, config.model.size, "model size")
  made = encoders.codec(config)
  told = made.temporal + made.channels
  if size.channels != made.channels or size.given not in (0, told):
    raise BadInput(f"model size {config.model.size!r} takes latents of {size.channels} channels and {size.given} for "
                   f"what is given, the codec makes {made.channels} and {told}: choose another size or codec.")
  remat.check(config.model.remat, mesh)
  if config.optimizer.offload:
    offload.check(mesh, "optimizer.offload", "--config.optimizer.offload=False")
  dtype = pick(DTYPES, config.model.dtype, "dtype")
  adapted = lora.Lora(**config.lora.to_dict()) if config.lora.rank else None
  if adapted and not (config.model.weights or config.pretrained):
    raise BadInput(f"lora.rank is {adapted.rank} and there is no base to adapt: give --config.model.weights=PATH, or "
                   "--config.lora.rank=0 to train the network itself.")
  network = WanDiT(size, mesh, config.model.attention, config.model.kernel, config.model.remat, dtype,
                   config.model.gate, config.model.mask)
  times, loss = config.times.to_dict(), config.loss
  given = times.pop("given")
  if not np.isfinite(times["late_from"]):
    raise BadInput(f"times.late_from = {times['late_from']} is no share of a run: take 0 .. 1.")
  times["late_from"] = round(times["late_from"] * config.train.steps)
  pick(WEIGHTS, loss.weight, "loss weight")
  method = step.Method(
    velocity=partial(velocity, network, adapted.scale if adapted else 1.0), codec=made,
    tasks=Mixture(config.tasks.to_dict()), times=TimeDraw(**times), weight=loss.weight, drop_text=loss.drop_text,
    drop_condition=loss.drop_condition, given=given, seed=config.seed, micro_batches=config.train.micro_batches)
  settings = {name: value for name, value in config.optimizer.items() if name != "offload"}
  parts = Parts(mesh=mesh, replicas=built.shape[meshes.REPLICA], size=size, codec=made, network=network, method=method,
                optimizer=optimizer.Optimizer(steps=config.train.steps, **settings), lora=adapted,
                buckets=parse(config.data.buckets), image_tokens=encoders.image_tokens(config, size),
                encoded=config.data.encoded, packed=config.data.packed, offload=config.optimizer.offload)
  if parts.packed:
    _check_packed(parts)
  shapes = [parts.latent_shape(bucket) for bucket in parts.buckets]
  for bucket, shape in zip(parts.buckets, shapes, strict=True):
    if shapes.count(shape) > 1:  # a batch is known by its shape
      raise BadInput(f"bucket {bucket} has the latents of another bucket, {' x '.join(map(str, shape))}: keep one of "
                     "them, with both their weights.")
    there = parts.of(bucket)
    attention.check(config.model.attention, config.model.kernel, there.mesh, size.heads, config.model.dtype,
                    _hides(there, bucket))
    _check_bucket(there, bucket)
  return replace(parts, buckets=tuple(_filled(parts.of(bucket), bucket, config.data.tokens)
                                      for bucket in parts.buckets))


def _check_packed(parts: Parts) -> None:
  if not parts.encoded:
    raise BadInput(f"data.packed is {parts.packed} and records hold clips, but only latents share rows: encode them "
                   "and give --config.data.encoded=True, or --config.data.packed=0.")
  if "globals" in parts.network.mask:
    raise BadInput(f"data.packed is {parts.packed} and model.mask is {parts.network.mask!r}: its global frames are "
                   "those of a row and not of a clip; take a mask without globals, or --config.data.packed=0.")


def _filled(parts: Parts, bucket: Bucket, tokens: int) -> Bucket:
  """A bucket with the largest batch of at most so many tokens, where it has none. parts: of that bucket."""
  if bucket.batch:
    return bucket
  if tokens < 1:
    raise BadInput(f"bucket {bucket} has no batch: write ...@BATCH, as in 9x32x48@16, or give --config.data.tokens.")
  (f, n), unit = parts.frame_tokens(bucket), meshes.batch_shards(parts.mesh) * parts.method.micro_batches
  if unit * f * n > tokens:
    raise BadInput(f"bucket {bucket}: the smallest batch, {unit} clips as replica x data x fsdp x micro_batches ask, "
                   f"is {unit * f * n:,} tokens, and data.tokens is {tokens:,}: give so many, or split each clip over "
                   f"more devices, as {bucket.frames}x{bucket.height}x{bucket.width}/2 says.")
  return replace(bucket, batch=tokens // (unit * f * n) * unit)


def budget(parts: Parts, config: ConfigDict) -> list[str]:
  """A line for each bucket whose batch data.tokens has settled."""
  lines = []
  for bucket, asked in zip(parts.buckets, parse(config.data.buckets), strict=True):
    if not asked.batch:
      f, n = parts.frame_tokens(bucket)
      lines.append(f"bucket {asked}: batches of {bucket.batch} clips of {f * n:,} tokens, {bucket.batch * f * n:,} of "
                   f"the {config.data.tokens:,} that data.tokens allows.")
  return lines


def _hides(parts: Parts, bucket: Bucket) -> sight.Rule | None:
  """What hides tokens from others: frames, shared rows, padding; None: nothing does. parts: of that bucket."""
  f, n = parts.frame_tokens(bucket)
  rule = replace(sight.parse(parts.network.mask, f), packed=bool(parts.packed))
  padded = f % parts.mesh.shape["clip"] or n % parts.mesh.shape["seq"]
  return rule if rule or padded or parts.packed else None


def _check_bucket(parts: Parts, bucket: Bucket) -> None:
  """parts: of that bucket."""
  shards = meshes.batch_shards(parts.mesh) * parts.method.micro_batches
  if bucket.batch % shards:
    raise BadInput(f"bucket {bucket}: a batch of {bucket.batch} does not divide by replica x data x fsdp x "
                   f"micro_batches = {shards}: take a multiple of it.")


def abstract_params(parts: Parts, kept: bool = False) -> PyTree:
  """Shapes and placement of the network's parameters; nothing is computed.

  kept: parameters that are not trained, whose large kernels may be of the dtype in which they are used anyway.
  """
  shapes = jax.eval_shape(partial(init, parts))
  rules = [*wan_placement.RULES, *(wan_placement.IMAGE_RULES if parts.size.image_width else [])]
  placed = placement.shardings(rules, shapes, parts.mesh)

  def place(path: tuple, leaf: jax.ShapeDtypeStruct, sharding) -> jax.ShapeDtypeStruct:
    name = placement.path_text(path)
    large = name.startswith("blocks/") and name.endswith("/kernel")
    return jax.ShapeDtypeStruct(leaf.shape, parts.network.dtype if kept and large else leaf.dtype, sharding=sharding)

  return jax.tree_util.tree_map_with_path(place, shapes, placed)


def abstract_trained(parts: Parts) -> PyTree:
  """Shapes and placement of what is trained: the network's parameters, or adapters, split as their kernels are."""
  base = abstract_params(parts)
  if parts.lora is None:
    return base
  kernels = flatten_dict(base, sep="/")
  shapes = flatten_dict(jax.eval_shape(partial(begin, parts), base), sep="/")

  def place(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    layer, _, name = path.rpartition("/")
    spec = kernels[f"{layer}/kernel"].sharding.spec
    *stack, i, o = (*spec, *[None] * (leaf.ndim - len(spec)))
    spec = jax.P(*stack, *((i, None) if name == "lora_a" else (None, o)))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(parts.mesh, spec))

  return unflatten_dict({path: place(path, leaf) for path, leaf in shapes.items()}, sep="/")


def begin(parts: Parts, base: PyTree) -> PyTree:
  """New adapters beside a base, of which only the shapes are read."""
  return lora.begin(parts.lora, base, keys.key(parts.method.seed, 0, "init"))


def init(parts: Parts) -> PyTree:
  """Parameters to start from; the seed and the network tell them, not the mesh."""
  return _initial(parts.network, keys.key(parts.method.seed, 0, "init"))


@partial(jax.jit, static_argnums=0)  # traced once, not each time that someone asks for shapes
def _initial(network: WanDiT, key: jax.Array) -> PyTree:
  size, b = network.size, meshes.batch_shards(network.mesh)  # the least batch that the mesh divides
  x = jnp.zeros((b, 1, size.patch, size.patch, size.channels))
  given = jnp.zeros((*x.shape[:-1], size.given)) if size.given else None
  image = jnp.zeros((b, size.image_positions or 1, size.image_width)) if size.image_width else None
  return network.init(key, x, jnp.zeros((b, 1)), jnp.zeros((b, size.text_tokens, size.text_width)), given,
                      image)["params"]


def loader(parts: Parts, config: ConfigDict, split: str, buckets: tuple[Bucket, ...] | None = None,
           whole: bool = False) -> mixture.Batches:
  """The pipeline of a split, this host's share of it, or the whole of it on every host."""
  if not config.data.records:
    raise BadInput("no records to read: give --config.data.records=FOLDER, made by data/pack.py from films.")
  deal = Deal(buckets or parts.buckets, config.data.assign, parts.packed, parts.codec.temporal)
  share = mixture.whole if whole else lambda bucket: meshes.held(parts.of(bucket).mesh)
  made = mixture.Batches(config.data.records, deal, split=split, fps=config.data.fps,
                         seed=config.seed, share=share, threads=config.data.threads)
  if made.encoded != parts.encoded:
    raise BadInput(f"{config.data.records} holds {'latents' if made.encoded else 'clips'} and data.encoded is "
                   f"{parts.encoded}: " + ("set --config.data.encoded=True." if made.encoded else
                                           "make latents of them with encode, or set --config.data.encoded=False."))
  if not meshes.alike(made.dealt):
    raise BadInput(f"{config.data.records}: hosts find other {split!r} records there, or other lengths of them: give "
                   "all the same files, whole.")
  return made


# Of a batch, what a step takes.
ARRAYS = ("frames", "character", "latents", "known", "mask", "text", "image", "ok", "segment")


def to_devices(parts: Parts, captions: Captions | None, batch: dict) -> dict[str, jax.Array]:
  """A host's batch on the mesh. captions: the text encoder; None where records hold text tokens."""
  host = {name: batch[name] for name in ARRAYS if name in batch}
  if captions:
    # On its own mesh: hosts that share a clip there are others than those that would on that of all buckets.
    host["text"] = captions(batch["caption"], meshes.view(parts.mesh))
  stop = meshes.tell_all(parts.mesh, int(np.max(batch.get("stop", 0))))
  return {**meshes.to_devices(parts.mesh, host), "stop": stop}
