"""A config of the tiny parts of `published` that commands can take: it enters their sizes for the whole program."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import published


def get_config():
  published.entered(tiny_wan=published.SIZE)
  made = published.config("tiny_wan", Path(), Path(), sample__solver="unipc", sample__steps=2, sample__boundary=0.9,
                          sample__multiplier=1.0, sample__area=32 * 48)
  made.pretrained = ""
  return made
