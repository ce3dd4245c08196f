"""Captions -> token ids, by the tokenizer that is published with the umT5 encoder.

Library: tokenizers, which the published `tokenizer.json` was written by and upstream runs; sentencepiece would read
only `spiece.model`, which lacks the rules for special tokens and spaces. Cleaning: as in Wan 2.1, wan/modules/t5.py.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ftfy
import numpy as np
import tokenizers
from jaxtyping import Bool, Int

from anisora_jax.errors import BadInput

FILE = "tokenizer.json"
PAD, END = "<pad>", "</s>"
WHERE = f"give the folder google/umt5-xxl of a Wan download, tokenizer of its diffusers form, or their {FILE}."


def clean(caption: str) -> str:
  """A caption with broken encodings mended, HTML entities resolved (also twice escaped ones) and single spaces."""
  return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split())


@dataclass(frozen=True)
class Tokenizer:
  """Made by `read`; cuts and pads to one length."""

  inner: tokenizers.Tokenizer

  def __call__(self, captions: Sequence[str]) -> tuple[Int[np.ndarray, "b s"], Bool[np.ndarray, "b s"]]:
    """Captions -> ids, int32, and which of them are real. The last real one ends the text, also of a cut caption."""
    # One by one: threads of encode_batch do not survive a fork, and the text network takes a thousand times longer.
    made = [self.inner.encode(clean(caption)) for caption in captions]
    return np.array([m.ids for m in made], np.int32), np.array([m.attention_mask for m in made], bool)


def read(path: str, length: int = 512, vocabulary: int = 256384) -> Tokenizer:
  """Reads a tokenizer file, or the one in a folder.

  length: tokens of every caption, the end included. vocabulary: rows of the encoder's embedding. Raises BadInput for a
  file that is missing, unreadable, not of the T5 kind or larger than the vocabulary.
  """
  file = Path(path) / FILE if Path(path).is_dir() else Path(path)
  if not file.is_file():
    raise BadInput(f"no tokenizer at {file}: {WHERE}")
  try:
    inner = tokenizers.Tokenizer.from_file(str(file))
  except Exception as failure:  # the library raises nothing narrower
    raise BadInput(f"{file} is no readable tokenizer ({str(failure).splitlines()[0]}): {WHERE}") from failure
  pad, end = inner.token_to_id(PAD), inner.token_to_id(END)
  if pad is None or end is None or inner.encode("").ids[-1:] != [end]:
    raise BadInput(f"{file} is not of the T5 kind, which pads with {PAD} and ends every text with {END}: {WHERE}")
  known = max(inner.get_vocab().values()) + 1
  if known > vocabulary:
    raise BadInput(f"{file} knows {known} tokens and the text encoder {vocabulary}: "
                   "take the tokenizer that was published with these weights.")
  inner.enable_truncation(length)
  inner.enable_padding(length=length, pad_id=pad, pad_token=PAD)
  return Tokenizer(inner)
