"""A published download at tiny size: transformers, VAE, text and image encoder and tokenizer, as diffusers stores them.

Its sizes are entered into our tables as "tiny" while it is used.
"""

from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import test_encoders
import test_vae
import test_wan
import torch
from ml_collections import ConfigDict

from anisora_jax.models.wan.image import IMAGE_SIZES
from anisora_jax.models.wan.sizes import SIZES, Size
from anisora_jax.models.wan.text import TEXT_SIZES
from anisora_jax.models.wan.vae_sizes import VAE_SIZES
from configs import tiny

NAME = "wan-tiny"
SIZE = Size(layers=2, width=48, heads=2, mlp=80, channels=6, given=10, text_width=24, text_tokens=11)
VAE, TEXT, IMAGE = test_vae.WAN21, test_encoders.TEXT, test_encoders.IMAGE
SEED = {"transformer": 0, "transformer_2": 1}


def entered(**sizes: Size) -> ExitStack:
  """Enters the tiny sizes, and transformers of these names, into our tables until it is left."""
  stack = ExitStack()
  tables = (SIZES, sizes), (VAE_SIZES, {NAME: VAE}), (TEXT_SIZES, {NAME: TEXT}), (IMAGE_SIZES, {NAME: IMAGE})
  for table, more in tables:
    stack.enter_context(patch.dict(table, more))
  return stack


def transformer(size: Size, seed: int) -> torch.nn.Module:
  model = test_wan.randomised(size)
  with torch.no_grad():
    for p in model.parameters():
      p.mul_(0.5 if seed else 1.0)
  return model.eval()


def write(folder: Path, size: Size, tokenizer: Path, experts: int = 1) -> dict[str, torch.nn.Module]:
  """Writes all parts, random, and returns them by the names of their folders. tokenizer: a folder to copy."""
  parts = {name: transformer(size, seed) for name, seed in list(SEED.items())[:experts]}
  parts |= {"vae": test_vae.randomised(VAE), "text_encoder": test_encoders.randomised(test_encoders.text_witness(TEXT))}
  if size.image_width:
    parts["image_encoder"] = test_encoders.randomised(test_encoders.image_witness(IMAGE))
  for name, model in parts.items():
    model.save_pretrained(folder / name)
  (folder / "tokenizer").mkdir()
  for file in tokenizer.iterdir():
    (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())
  return {name: model.eval() for name, model in parts.items()}


def config(size: str, records: Path, pretrained: Path, **changes) -> ConfigDict:
  """A config on the tiny parts. changes: SECTION__FIELD."""
  made = tiny.get_config()
  made.pretrained, made.data.records = str(pretrained), str(records)
  made.model.size, made.model.gate = size, 0.0
  made.codec.name = made.text.name = made.image.name = NAME
  made.text.dtype = "float32"
  made.data.buckets, made.data.views = "9x32x48@8", 2
  for name, value in changes.items():
    section, field = name.split("__")
    made[section][field] = value
  return made
