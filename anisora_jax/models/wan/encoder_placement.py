"""Where each parameter of the text and image encoders lives on the mesh; W is fsdp, clip and seq together."""

from jax.sharding import PartitionSpec as P

from anisora_jax.parallel.mesh import WEIGHTS as W

TEXT_RULES = [
  (r"^embedding$", P(None, (*W, "tensor"))),                        # [token, d/(W tensor)]
  (r"^blocks/.*/(q|k|v|gate|up)/kernel$", P(None, W, "tensor")),    # [layer, d/W, out/tensor]
  (r"^blocks/.*/(o|down)/kernel$", P(None, "tensor", W)),           # [layer, in/tensor, d/W]
  (r"/distances$", P(None, None, "tensor")),                        # [layer, bucket, a/tensor]
  (r"(^|/)\w*norm/scale$", P()),
]
IMAGE_RULES = [
  (r"^blocks/(qkv|o)/kernel$", P(None, W, None)),                   # [layer, in/W, out]
  (r"^blocks/mlp/up/kernel$", P(None, W, "tensor")),                # [layer, d/W, out/tensor]
  (r"^blocks/mlp/down/kernel$", P(None, "tensor", W)),              # [layer, in/tensor, d/W]
  (r"^last/(qkv|o|mlp/up|mlp/down)/kernel$", P(W, None)),           # [in/W, out]
  (r"^(patch_in|class|positions)$|/(bias|scale)$", P()),
]
