"""What a dry run advises: over how many devices the clips of each bucket are best split."""

from ml_collections import ConfigDict

from anisora_jax.experiment.parts import Parts
from anisora_jax.loaders import latents
from anisora_jax.loaders.buckets import Bucket, parse
from anisora_jax.parallel import mesh as meshes
from anisora_jax.planning import advice
from anisora_jax.training import report


def clips(parts: Parts, bucket: Bucket, tokens: int) -> advice.Clips:
  """The batches that a bucket could have, by how many devices share a clip. tokens: of a batch, 0 where it is fixed."""
  f, n = parts.frame_tokens(bucket)
  sizes = parts.of(bucket).mesh.shape
  both, found = sizes["fsdp"] * sizes["seq"], {}
  for degree in (one for one in range(1, both + 1) if both % one == 0):
    unit = parts.mesh.size // sizes["tensor"] // degree * parts.method.micro_batches
    batch = tokens // (unit * f * n) * unit if tokens else bucket.batch
    if batch and batch % unit == 0:
      found[degree] = batch
  now = sizes["seq"]
  return advice.Clips(latents.size_name(bucket), f * n, now, {**found, now: bucket.batch})


def lines(parts: Parts, config: ConfigDict) -> list[str]:
  """The advice, for people; none for devices whose speed is unknown, or where frames are split too."""
  kind = meshes.device_kind(parts.mesh)
  peak, link = report.peak(kind), next((link for name, link in advice.LINKS.items() if name in kind), None)
  if not (peak and link) or parts.mesh.shape["clip"] > 1:
    return []
  cost = advice.cost(parts.size, peak, link, config.model.attention in ("ulysses", "hybrid"))
  devices = parts.mesh.size // parts.mesh.shape["tensor"]
  asked = zip(parts.buckets, parse(config.data.buckets), strict=True)
  return advice.lines([clips(parts, bucket, 0 if one.batch else config.data.tokens) for bucket, one in asked], devices,
                      cost)
