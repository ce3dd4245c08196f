"""Where each parameter of the Wan transformer lives on the mesh.

Kernels split one side over W, which is fsdp, clip and seq together, and, where heads or the MLP's hidden units run, the
other over tensor. What is small (biases, norms, modulations) is whole everywhere.
"""

from jax.sharding import PartitionSpec as P

from anisora_jax.parallel.mesh import WEIGHTS as W

RULES = [
  (r"^blocks/.*/(q|k|v|k_image|v_image|up)/kernel$", P(None, W, "tensor")),        # [layer, d/W, out/tensor]
  (r"^blocks/.*/(o|down)/kernel$", P(None, "tensor", W)),                          # [layer, in/tensor, d/W]
  (r"^blocks/.*/(q|k|v|k_image|v_image|up)/bias$", P(None, "tensor")),             # [layer, out/tensor]
  (r"^(time_out|time_modulation|text/up)/kernel$", P(W, "tensor")),                # [in/W, out/tensor]
  (r"^text/down/kernel$", P("tensor", W)),                                         # [in/tensor, out/W]
  (r"^(patch_in|time_in)/kernel$", P(None, W)),                                    # [in, d/W]
  # Whole, for it is small, and were it gathered, it would be beside the blocks' loop (see training.step.after).
  (r"^head/out/kernel$", P()),                                                     # [d, out]
  (r"/(bias|scale|modulation|positions)$", P()),
]
IMAGE_RULES = [                                                                    # only where image tokens are used
  (r"^image/mlp/up/kernel$", P(W, "tensor")),                                      # [in/W, out/tensor]
  (r"^image/mlp/down/kernel$", P("tensor", W)),                                    # [in/tensor, out/W]
]
