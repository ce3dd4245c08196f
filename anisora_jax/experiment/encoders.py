"""Codec, text encoder and image encoder of a config, and where a published download keeps their weights."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, PyTree
from ml_collections import ConfigDict

from anisora_jax.errors import BadInput, pick
from anisora_jax.experiment import weights
from anisora_jax.models import names
from anisora_jax.models.codec import Codec
from anisora_jax.models.pixels import Pixels
from anisora_jax.models.wan import encoder_placement, tokenizer
from anisora_jax.models.wan.image import IMAGE_SIZES, CLIPVision, ImageSize
from anisora_jax.models.wan.published import KINDS, AnySize, Kind
from anisora_jax.models.wan.sizes import Size
from anisora_jax.models.wan.text import TEXT_SIZES, UMT5, TextEncoder
from anisora_jax.models.wan.vae import WanVAE
from anisora_jax.models.wan.vae_sizes import VAE_SIZES
from anisora_jax.models.words import Words
from anisora_jax.parallel import placement

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
PLACES = {  # field of a config -> where Wan's own downloads keep it, then where diffusers' do
  "codec.weights": ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth", "vae"),
  "text.weights": ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder"),
  "text.tokenizer": ("google/umt5-xxl", "tokenizer"),
  "image.weights": ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "image_encoder"),
}
Captions = Callable[..., Float[np.ndarray, "b s e"]]  # captions, maybe a view of the mesh -> their text tokens


def place(config: ConfigDict, field: str) -> Path:
  """Where the weights of a field of PLACES lie: as the field says, else in config.pretrained. Raises BadInput."""
  section, name = field.split(".")
  said, folder = config[section][name], Path(config.pretrained)
  if said and not Path(said).exists():
    raise BadInput(f"{field} {said} does not exist: give --config.{field}=PATH of a file or folder that is there.")
  if said:
    return Path(said)
  if not config.pretrained:
    raise BadInput(f"{section} {config[section].name!r} needs weights: give --config.{field}=PATH, or "
                   "--config.pretrained=FOLDER of a Wan, AniSora or diffusers download.")
  found = [folder / there for there in PLACES[field] if (folder / there).exists()]
  if not found:
    raise BadInput(f"{folder} holds none of {', '.join(PLACES[field])}: fetch it, or give --config.{field}=PATH.")
  return found[0]


def codec(config: ConfigDict) -> Codec:
  """The codec without parameters, which knows its shapes. Raises BadInput."""
  settings = config.codec
  if settings.name == "pixels":
    return Pixels(settings.spatial, settings.temporal, settings.scale)
  size = pick({"pixels": None, **VAE_SIZES}, settings.name, "codec")
  return WanVAE({}, size, pick(DTYPES, settings.dtype, "dtype"), settings.chunked, settings.tile, settings.overlap)


def load_codec(config: ConfigDict, mesh: Mesh, parts: Sequence[str] = ("encoder", "decoder")) -> Codec:
  """The codec with its parameters, float32, whole on every device. parts: which half, or both, is wanted."""
  made = codec(config)
  if isinstance(made, Pixels):
    return made
  source = weights.source(place(config, "codec.weights"), made.size, kind=KINDS["codec"])
  return made.replace(params=weights.read(source, abstract_codec(config, mesh, parts).params))


def abstract_codec(config: ConfigDict, mesh: Mesh, parts: Sequence[str]) -> Codec:
  """Shapes and placement of what `load_codec` reads."""
  made = codec(config)
  if isinstance(made, Pixels):
    return made
  shapes = {path: shape for path, shape in names.shapes(KINDS["codec"].entries(made.size, "native")).items()
            if path.partition("/")[0] in parts}
  return made.replace(params=_abstract(mesh, [(r"", P())], jnp.float32, shapes))


def captions(config: ConfigDict, mesh: Mesh, size: Size) -> Captions:
  """Captions -> text tokens, float32, by the text encoder that the config names, its weights read onto the mesh."""
  settings = config.text
  encoder = pick({"words": None, **TEXT_SIZES}, settings.name, "text encoder")  # words have no weights
  if encoder is None:
    return Words(size.text_tokens, size.text_width)
  if encoder.width != size.text_width:
    raise BadInput(f"text encoder {settings.name!r} makes tokens of width {encoder.width} and model size "
                   f"{config.model.size!r} reads {size.text_width}: choose another of either.")
  words = tokenizer.read(str(place(config, "text.tokenizer")), size.text_tokens, encoder.vocabulary)
  dtype = pick(DTYPES, settings.dtype, "dtype")
  params = _read(place(config, "text.weights"), KINDS["text"], encoder,
                 partial(_abstract, mesh, encoder_placement.TEXT_RULES, dtype))
  return partial(TextEncoder(UMT5(encoder, mesh, dtype), words), params)


def pictures(config: ConfigDict, mesh: Mesh, size: Size) -> tuple[CLIPVision, PyTree] | None:
  """(the image encoder, its parameters on the mesh) of a transformer that reads image tokens, None for others."""
  if not size.image_width:
    return None
  encoder, dtype = _image_size(config, size), pick(DTYPES, config.image.dtype, "dtype")
  params = _read(place(config, "image.weights"), KINDS["image"], encoder,
                 partial(_abstract, mesh, encoder_placement.IMAGE_RULES, dtype))
  return CLIPVision(encoder, mesh, dtype), params


def _image_size(config: ConfigDict, size: Size) -> ImageSize:
  encoder = pick(IMAGE_SIZES, config.image.name, "image encoder")
  if encoder.width != size.image_width or size.image_positions % encoder.tokens:
    raise BadInput(f"image encoder {config.image.name!r} makes {encoder.tokens} tokens of width {encoder.width} and "
                   f"model size {config.model.size!r} reads {size.image_positions or 'any number'} of width "
                   f"{size.image_width}: choose another of either.")
  return encoder


def image_count(size: Size) -> int:
  """How many pictures a transformer is shown: two where it has learned positions for the tokens of two."""
  return 0 if not size.image_width else 2 if size.image_positions else 1


def image_tokens(config: ConfigDict, size: Size) -> int:
  """How many tokens those pictures become."""
  return image_count(size) * _image_size(config, size).tokens if size.image_width else 0


def _abstract(mesh: Mesh, rules: placement.Rules, dtype, shapes: dict[str, tuple[int, ...]]) -> PyTree:
  tree = unflatten_dict({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()}, sep="/")
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree,
                      placement.shardings(rules, tree, mesh))


def _read(path: Path, kind: Kind, size: AnySize, abstract: Callable[[dict], PyTree]) -> PyTree:
  source = weights.source(path, size, kind=kind)
  return weights.read(source, abstract(names.shapes(source.entries("native"))))
