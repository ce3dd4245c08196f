"""Where each parameter of the text and image encoders lives on the mesh."""

from jax.sharding import PartitionSpec as P

TEXT_RULES = [
  (r"^embedding$", P(None, ("fsdp", "tensor"))),                    # [token, d/(fsdp tensor)]
  (r"^blocks/.*/(q|k|v|gate|up)/kernel$", P(None, "fsdp", "tensor")),  # [layer, d/fsdp, out/tensor]
  (r"^blocks/.*/(o|down)/kernel$", P(None, "tensor", "fsdp")),      # [layer, in/tensor, d/fsdp]
  (r"/distances$", P(None, None, "tensor")),                        # [layer, bucket, a/tensor]
  (r"(^|/)\w*norm/scale$", P()),
]
IMAGE_RULES = [
  (r"^blocks/(qkv|o)/kernel$", P(None, "fsdp", None)),              # [layer, in/fsdp, out]
  (r"^blocks/mlp/up/kernel$", P(None, "fsdp", "tensor")),           # [layer, d/fsdp, out/tensor]
  (r"^blocks/mlp/down/kernel$", P(None, "tensor", "fsdp")),         # [layer, in/tensor, d/fsdp]
  (r"^last/(qkv|o|mlp/up|mlp/down)/kernel$", P("fsdp", None)),      # [in/fsdp, out]
  (r"^(patch_in|class|positions)$|/(bias|scale)$", P()),
]
