"""Where each parameter of the Wan transformer lives on the mesh.

Kernels split one side over fsdp and, where heads or the MLP's hidden units run, the other over tensor. What is small
(biases, norms, modulations) is whole everywhere.
"""

from jax.sharding import PartitionSpec as P

RULES = [
  (r"^blocks/.*/(q|k|v|k_image|v_image|up)/kernel$", P(None, "fsdp", "tensor")),   # [layer, d/fsdp, out/tensor]
  (r"^blocks/.*/(o|down)/kernel$", P(None, "tensor", "fsdp")),                     # [layer, in/tensor, d/fsdp]
  (r"^blocks/.*/(q|k|v|k_image|v_image|up)/bias$", P(None, "tensor")),             # [layer, out/tensor]
  (r"^(time_out|time_modulation|text/up)/kernel$", P("fsdp", "tensor")),           # [in/fsdp, out/tensor]
  (r"^text/down/kernel$", P("tensor", "fsdp")),                                    # [in/tensor, out/fsdp]
  (r"^(patch_in|time_in)/kernel$", P(None, "fsdp")),                               # [in, d/fsdp]
  # Whole, for it is small, and were it gathered, it would be beside the blocks' loop (see training.step.after).
  (r"^head/out/kernel$", P()),                                                     # [d, out]
  (r"/(bias|scale|modulation|positions)$", P()),
]
IMAGE_RULES = [                                                                    # only where image tokens are used
  (r"^image/mlp/up/kernel$", P("fsdp", "tensor")),                                 # [in/fsdp, out/tensor]
  (r"^image/mlp/down/kernel$", P("tensor", "fsdp")),                               # [in/tensor, out/fsdp]
]
