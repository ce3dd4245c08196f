"""The published shapes of the Wan codecs.

From: the checkpoints of Wan 2.1 and of Wan 2.2 TI2V-5B; means and deviations from wan/modules/vae.py and vae2_2.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

from anisora_jax.errors import BadInput


class Level(NamedTuple):
  """Blocks at one resolution: channels in and out, the channels after its step to the next, and that step.

  step: "space" halves or doubles rows and columns, "time" frames too, "" is the last level, which has none.
  """

  i: int
  o: int
  after: int
  step: str


@dataclass(frozen=True)
class VAESize:
  """Everything that fixes the shapes of a codec's parameters.

  encoder, decoder: channels at full resolution, which `widths` multiplies level by level. means, deviations: of each
  latent channel, by which latents are normalised. time_steps: which steps between levels, from pixels on, halve the
  frames too. blocks: residual blocks of an encoder's level; a decoder's has one more. shortcuts: around each level
  too, by rearranging (Wan 2.2). patch: pixels a side that are moved into channels first.
  """

  encoder: int
  decoder: int
  means: tuple[float, ...]
  deviations: tuple[float, ...]
  widths: tuple[int, ...] = (1, 2, 4, 4)
  time_steps: tuple[bool, ...] = (False, True, True)
  blocks: int = 2
  shortcuts: bool = False
  patch: int = 1

  def __post_init__(self):
    if len(self.means) != len(self.deviations):
      raise BadInput(f"{len(self.means)} means for {len(self.deviations)} deviations: give one of each for a channel.")
    if len(self.time_steps) != len(self.widths) - 1:
      raise BadInput(f"{len(self.widths)} levels have {len(self.widths) - 1} steps, got {len(self.time_steps)}: "
                     "say of each whether it halves the frames.")

  @property
  def channels(self) -> int:
    return len(self.means)

  @property
  def temporal(self) -> int:
    return 2 ** sum(self.time_steps)

  @property
  def spatial(self) -> int:
    return self.patch * 2 ** len(self.time_steps)

  @property
  def pixel(self) -> int:
    """Channels of what the first convolution sees."""
    return 3 * self.patch**2

  def encoder_levels(self) -> list[Level]:
    return self._levels(self.encoder, (1, *self.widths), self.time_steps, False)

  def decoder_levels(self) -> list[Level]:
    """From latents on. A step up halves the channels, unless a shortcut around the level must meet them."""
    return self._levels(self.decoder, (self.widths[-1], *self.widths[::-1]), self.time_steps[::-1], not self.shortcuts)

  def _levels(self, base: int, widths: tuple[int, ...], times: tuple[bool, ...], halve: bool) -> list[Level]:
    levels, before = [], base * widths[0]
    for width, step in zip(widths[1:], [*("time" if time else "space" for time in times), ""], strict=True):
      after = base * width // 2 if halve and step else base * width
      levels.append(Level(before, base * width, after, step))
      before = after
    return levels


VAE_SIZES = {
  "wan21": VAESize(
    encoder=96, decoder=96,
    means=(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
           0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    deviations=(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)),
  "wan22": VAESize(
    encoder=160, decoder=256, shortcuts=True, patch=2,
    means=(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
           -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
           -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
           -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
           -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
           0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    deviations=(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
                0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
                0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
                0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
                0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
                0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744)),
}
