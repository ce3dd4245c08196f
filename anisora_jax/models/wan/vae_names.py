"""Each parameter of the Wan codecs by its PyTorch names (native and diffusers) and layout, both ways.

Ours number levels and the blocks of a level. Native 2.1 numbers blocks and steps through all levels, and so does
diffusers in the encoder. From: the checkpoints of Wan 2.1 and of Wan 2.2 TI2V-5B, and diffusers.AutoencoderKLWan.
"""

from collections.abc import Iterator

from anisora_jax.errors import pick
from anisora_jax.models import names
from anisora_jax.models.names import BIAS, leaf
from anisora_jax.models.wan.vae_sizes import Level, VAESize

NAMINGS = {"native": 1, "diffusers": 2}  # naming -> its column in the table

LAYOUTS = {
  "conv": (leaf("/kernel", ".weight", "t h w i o -> o i t h w"), BIAS),
  "frame conv": (leaf("/kernel", ".weight", "h w i o -> o i h w"), BIAS),
  "time conv": (leaf("/kernel", ".weight", "t i o -> o i t 1 1"), BIAS),
  "linear": (leaf("/kernel", ".weight", "i o -> o i 1 1 1"), BIAS),
  "frame linear": (leaf("/kernel", ".weight", "i o -> o i 1 1"), BIAS),
  "scale": (leaf("/scale", ".gamma", "c -> c 1 1 1"),),
  "frame scale": (leaf("/scale", ".gamma", "c -> c 1 1"),),
}

# ours, native, diffusers, layout, shape of our kernel or vector. i channels in · o out · oo, ooo 2, 3 times as many ·
# a after the step
RESIDUAL = [
  ("norm_in", "residual.0", "norm1", "scale", "i"),
  ("conv_in", "residual.2", "conv1", "conv", "3 3 3 i o"),
  ("norm_out", "residual.3", "norm2", "scale", "o"),
  ("conv_out", "residual.6", "conv2", "conv", "3 3 3 o o"),
]
SHORTCUT = [("shortcut", "shortcut", "conv_shortcut", "linear", "i o")]
SPACE = [("space", "resample.1", "resample.1", "frame conv", "3 3 o a")]
TIME = {
  "encoder": [("time", "time_conv", "time_conv", "time conv", "3 o o")],
  "decoder": [("time", "time_conv", "time_conv", "time conv", "3 o oo")],
}
ATTENTION = [
  ("norm", "norm", "norm", "frame scale", "o"),
  ("qkv", "to_qkv", "to_qkv", "frame linear", "o ooo"),
  ("out", "proj", "proj", "frame linear", "o o"),
]
# d channels of the first level · e of the last · p of pixels · z of latents · zz of their means and variances
RIM = {
  "encoder": [
    ("conv_in", "encoder.conv1", "encoder.conv_in", "conv", "3 3 3 p d"),
    ("norm", "encoder.head.0", "encoder.norm_out", "scale", "e"),
    ("conv_out", "encoder.head.2", "encoder.conv_out", "conv", "3 3 3 e zz"),
    ("latents", "conv1", "quant_conv", "linear", "zz zz"),
  ],
  "decoder": [
    ("latents", "conv2", "post_quant_conv", "linear", "z z"),
    ("conv_in", "decoder.conv1", "decoder.conv_in", "conv", "3 3 3 z d"),
    ("norm", "decoder.head.0", "decoder.norm_out", "scale", "e"),
    ("conv_out", "decoder.head.2", "decoder.conv_out", "conv", "3 3 3 e p"),
  ],
}
MIDDLE = [  # ours, native, diffusers, rows
  ("block_in", "middle.0", "mid_block.resnets.0", RESIDUAL),
  ("attention", "middle.1", "mid_block.attentions.0", ATTENTION),
  ("block_out", "middle.2", "mid_block.resnets.1", RESIDUAL),
]
# With shortcuts or not -> part -> native and diffusers: how the names of a level's block begin, and those of its step.
# l level · n number in it · t number through all levels; a step counts as the block after the last
BEGINS = {
  False: {
    "encoder": (("encoder.downsamples.{t}", "encoder.downsamples.{t}"),
                ("encoder.down_blocks.{t}", "encoder.down_blocks.{t}")),
    "decoder": (("decoder.upsamples.{t}", "decoder.upsamples.{t}"),
                ("decoder.up_blocks.{l}.resnets.{n}", "decoder.up_blocks.{l}.upsamplers.0")),
  },
  True: {
    "encoder": (("encoder.downsamples.{l}.downsamples.{n}", "encoder.downsamples.{l}.downsamples.{n}"),
                ("encoder.down_blocks.{l}.resnets.{n}", "encoder.down_blocks.{l}.downsampler")),
    "decoder": (("decoder.upsamples.{l}.upsamples.{n}", "decoder.upsamples.{l}.upsamples.{n}"),
                ("decoder.up_blocks.{l}.resnets.{n}", "decoder.up_blocks.{l}.upsampler")),
  },
}


def _layer(rows: list[names.Row], column: int, ours: str, theirs: str, i: int, o: int, a: int = 0) -> list[names.Entry]:
  letters = {"3": 3, "i": i, "o": o, "oo": 2 * o, "ooo": 3 * o, "a": a}
  return list(names.entries(rows, column, letters, f"{ours}/", f"{theirs}.", layouts=LAYOUTS))


def _level(size: VAESize, part: str, column: int, number: int, level: Level) -> Iterator[names.Entry]:
  """The blocks of a level, and its step."""
  ours, i, blocks = f"{part}/level_{number}", level.i, size.blocks + (part == "decoder")
  block_begins, step_begins = BEGINS[size.shortcuts][part][column - 1]
  for n in range(blocks):
    rows = RESIDUAL + (SHORTCUT if i != level.o else [])
    theirs = block_begins.format(l=number, n=n, t=number * (blocks + 1) + n)
    yield from _layer(rows, column, f"{ours}/block_{n}", theirs, i, level.o)
    i = level.o
  steps = {"": [], "space": SPACE, "time": SPACE + TIME[part]}[level.step]
  theirs = step_begins.format(l=number, n=blocks, t=number * (blocks + 1) + blocks)
  yield from _layer(steps, column, ours, theirs, i, level.o, level.after)


def entries(size: VAESize, naming: str) -> list[names.Entry]:
  """Every tensor of a codec of this size. naming: "native" or "diffusers"."""
  column, found = pick(NAMINGS, naming, "naming"), []
  for part, levels in [("encoder", size.encoder_levels()), ("decoder", size.decoder_levels())]:
    first, last = levels[0].i, levels[-1].o
    letters = {"3": 3, "p": size.pixel, "z": size.channels, "zz": 2 * size.channels, "d": first, "e": last}
    found += names.entries(RIM[part], column, letters, f"{part}/", layouts=LAYOUTS)
    width = last if part == "encoder" else first
    for row in MIDDLE:
      found += _layer(row[3], column, f"{part}/middle/{row[0]}", f"{part}.{row[column]}", width, width)
    for number, level in enumerate(levels):
      found += _level(size, part, column, number, level)
  return found
