"""The published shapes of the Wan transformers, and small ones for tests and embedded films.

From: the checkpoints of Wan 2.1 and 2.2; `parameters` reproduces their counts exactly.
"""

from dataclasses import dataclass

from anisora_jax.errors import BadInput


@dataclass(frozen=True)
class Size:
  """Everything that fixes the shapes of a transformer's parameters.

  channels: of the noisy latents, also of the velocity. given: channels that tell what is given (mask and known
  latents), 0 for a model that knows it by noise times alone. text_width, text_tokens: of the text encoder; fewer tokens
  are padded with zeros, which take part. image_width: of the image encoder's tokens, 0 for none. image_positions: of
  image tokens that have a learned position each, 0 for none (first and last frame: 2 x 257).
  """

  layers: int
  width: int
  heads: int
  mlp: int
  channels: int = 16
  given: int = 0
  text_width: int = 4096
  text_tokens: int = 512
  image_width: int = 0
  image_positions: int = 0
  waves: int = 256
  patch: int = 2

  def __post_init__(self):
    if self.width % self.heads or (self.width // self.heads) % 2:
      raise BadInput(f"width {self.width} over {self.heads} heads: each head needs a whole and even width.")
    if self.image_positions and not self.image_width:
      raise BadInput(f"{self.image_positions} image positions without image tokens: give an image_width.")

  @property
  def head_width(self) -> int:
    return self.width // self.heads

  def parameters(self) -> int:
    """The exact number of parameters."""
    d, cell = self.width, self.patch**2
    attention = 4 * (d * d + d) + 2 * d
    image_attention = 2 * (d * d + d) + d if self.image_width else 0
    block = 2 * attention + image_attention + 2 * d * self.mlp + self.mlp + d + 2 * d + 6 * d
    rim = (cell * (self.channels + self.given) + 1) * d + (d + 1) * cell * self.channels + 2 * d
    text = (self.text_width + 1) * d + (d + 1) * d
    time = (self.waves + 1) * d + (d + 1) * d + (d + 1) * 6 * d
    i = self.image_width
    image = 2 * i + (i + 1) * i + (i + 1) * d + 2 * d + self.image_positions * i if i else 0
    return self.layers * block + rim + text + time + image

  def forward_flops(self, frames: int, frame_tokens: int, image_tokens: int = 0, seen: float = 1.0) -> float:
    """Multiply-adds x 2 of one forward pass over one clip: matrix products of tokens and attention, nothing else.

    seen: the share of a clip that a token attends to.
    """
    d, tokens = self.width, frames * frame_tokens
    per_token = 2 * (6 * d * d + 2 * d * self.mlp)
    rim = 2 * d * self.patch**2 * (2 * self.channels + self.given)
    text = self.layers * 4 * d * d * (self.text_tokens + image_tokens)
    attention = self.attention_flops(frames, frame_tokens, image_tokens, seen)
    return float(tokens * (self.layers * per_token + rim) + text) + attention

  def attention_flops(self, frames: int, frame_tokens: int, image_tokens: int = 0, seen: float = 1.0) -> float:
    """Those of them that have no weights: logits, and the sums of values."""
    tokens = frames * frame_tokens
    return 4.0 * self.layers * self.width * tokens * (seen * tokens + self.text_tokens + image_tokens)


SIZES = {
  "tiny": Size(layers=4, width=96, heads=4, mlp=256, channels=12, given=13, text_width=64, text_tokens=24),
  "toons": Size(layers=6, width=192, heads=4, mlp=512, channels=12, given=13, text_width=64, text_tokens=24),
  "wan21_t2v_1p3b": Size(layers=30, width=1536, heads=12, mlp=8960),
  "wan21_t2v_14b": Size(layers=40, width=5120, heads=40, mlp=13824),
  "wan21_i2v_1p3b": Size(layers=30, width=1536, heads=12, mlp=8960, given=20, image_width=1280),
  "wan21_i2v_14b": Size(layers=40, width=5120, heads=40, mlp=13824, given=20, image_width=1280),
  "wan21_flf2v_14b": Size(layers=40, width=5120, heads=40, mlp=13824, given=20, image_width=1280, image_positions=514),
  "wan22_t2v_a14b": Size(layers=40, width=5120, heads=40, mlp=13824),
  "wan22_i2v_a14b": Size(layers=40, width=5120, heads=40, mlp=13824, given=20),
  "wan22_ti2v_5b": Size(layers=30, width=3072, heads=24, mlp=14336, channels=48),
}
