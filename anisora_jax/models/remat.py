"""What a layer keeps of its forward pass for the backward pass, on its device or in its host's memory.

The rest is computed again. "attention" is the output of self-attention and its log-sum-exp, so that the most expensive
part of a long clip is never computed twice; "input" is the layer's input, which is kept in any case: all that can be
chosen is where.
"""

import jax
from jax.sharding import Mesh

from anisora_jax.errors import pick
from anisora_jax.parallel import offload
from anisora_jax.parallel.ring import SAVED

INPUT = "layer input"  # the name under which policies find what a layer starts from
POLICIES = jax.checkpoint_policies


def _on_host(*names: str):
  """Keeps these on the host and nothing else."""
  return POLICIES.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=list(names), offload_src=offload.DEVICE,
    offload_dst=offload.HOST)


REMAT = {  # name in configs -> policy
  "none": POLICIES.everything_saveable,
  "attention": POLICIES.save_only_these_names(SAVED),
  "attention_offload": _on_host(SAVED),
  "matmuls": POLICIES.dots_with_no_batch_dims_saveable,
  "full": POLICIES.nothing_saveable,
  "full_offload": _on_host(INPUT),
  "offload": _on_host(INPUT, SAVED),
}


def check(name: str, mesh: Mesh) -> None:
  """Raises BadInput for a policy that does not exist, or cannot be had on this mesh."""
  pick(REMAT, name, "remat policy")
  if name.endswith("offload"):
    others = " or ".join(repr(other) for other in REMAT if not other.endswith("offload"))
    offload.check(mesh, f"model.remat={name}", others)
