"""What published Wan files tell of the network in them: which it is, its naming, its size, its config.json.

Names and shapes fix everything but the heads, which are 128 wide in all that is published and 80 in CLIP, the text
tokens, 512, the farthest distance of umT5, 128, and the means and deviations of latents; a config.json says them where
they are otherwise.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from anisora_jax.errors import BadInput, pick
from anisora_jax.models import names
from anisora_jax.models.wan import encoder_names, vae_names
from anisora_jax.models.wan.image import IMAGE_SIZES, ImageSize
from anisora_jax.models.wan.names import BLOCK, IMAGE_RIM, NAMINGS, POSITION_RIM, RIM, entries
from anisora_jax.models.wan.sizes import SIZES, Size
from anisora_jax.models.wan.text import TEXT_SIZES, TextSize
from anisora_jax.models.wan.vae_sizes import VAE_SIZES, VAESize

HEAD, IMAGE_HEAD = 128, 80
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")  # ComfyUI's, in front of native names
# The tokenizer that ComfyUI's umT5 brings, and what CLIP's published image half has behind what Wan reads.
UNUSED = re.compile(r"spiece_model$|visual_projection\.weight$|logit_scale$")
Shapes = Mapping[str, tuple[int, ...]]
AnySize = Size | VAESize | TextSize | ImageSize


class Form(NamedTuple):
  """How a kind of network is written in a format. file: how files begin. config: what makes the config.json, if any."""

  naming: str
  file: str = ""
  config: Callable[[Any], dict[str, Any]] | None = None


class Kind(NamedTuple):
  """A kind of network: what is needed to know its published files, and to write them.

  signs: naming -> the end of a name that only this kind has in it. rename: (names found, sign) -> {found: in the
  table}; what it leaves out is not used. size_of: (shapes, naming, config) -> size. configs: values of _class_name or
  model_type in a config.json of this kind. refuse: raises BadInput for a format that cannot hold a size. wide: paths
  that publishers may keep in float32 beside matrices of 16 bits, all that the network computes in float32 anyway.
  """

  noun: str
  signs: Mapping[str, str]
  rename: Callable[[Iterable[str], str], dict[str, str]]
  size_of: Callable[[Shapes, str, Mapping[str, Any]], AnySize]
  entries: Callable[[Any, str], list[names.Entry]]
  sizes: Mapping[str, AnySize]
  configs: tuple[str, ...]
  forms: Mapping[str, Form]
  refuse: Callable[[Any, str], None] = lambda size, form: None
  wide: str = "(?!)"


def recognise(found: Iterable[str]) -> tuple["Kind", str, dict[str, str]]:
  """(kind, naming, {name: name in the table}) of the network that has these names. Raises BadInput for another's."""
  found = list(found)
  for kind in KINDS.values():
    for naming, sign in kind.signs.items():
      if any(name.endswith(sign) for name in found):
        return kind, naming, kind.rename(found, sign)
  raise BadInput(f"these are not the weights of a Wan {' or '.join(kind.noun for kind in KINDS.values())}: their names "
                 f"are {', '.join(sorted(found)[:3])} and the like.")


def title(kind: Kind, size: AnySize) -> str:
  """The names that a size has here, or its numbers: "wan21_t2v_14b or wan22_t2v_a14b"."""
  numbers = ", ".join(f"{name} {value}" for name, value in asdict(size).items() if len(str(value)) < 40)
  return " or ".join(name for name, other in kind.sizes.items() if other == size) or f"a custom size, {numbers}"


def _shape(found: Shapes, name: str, dims: int) -> tuple[int, ...]:
  names.refuse([name] if name not in found else [], list(found), "missing tensors")
  if len(found[name]) != dims or not all(found[name]):
    raise BadInput(f"{name} has shape {tuple(found[name])}, and a Wan network's has {dims} dimensions.")
  return tuple(found[name])


def _told(config: Mapping[str, Any], *keys: str) -> int | None:
  """The first of some numbers that a config.json tells."""
  value = next((config[key] for key in keys if key in config), None)
  if value is not None and (not isinstance(value, int) or value < 1):
    raise BadInput(f"config.json says {keys[0]} = {value!r}, which is no number of them: mend it.")
  return value


def _layers(found: Shapes, start: str, config: Mapping[str, Any], key: str) -> int:
  """How many there are of what is numbered after `start`, all of them or BadInput."""
  numbers = [int(match[1]) for match in map(re.compile(re.escape(start) + r"(\d+)\.").match, found) if match]
  layers = min(1 + max(numbers, default=0), len(found))
  if _told(config, key) not in (None, layers):
    raise BadInput(f"config.json tells of {config[key]} layers and there are {layers}: fetch all of its files.")
  return layers


def _heads(config: Mapping[str, Any], keys: tuple[str, ...], width: int, head: int) -> int:
  heads = _told(config, *keys)
  if heads is None and width % head:
    raise BadInput(f"a width of {width} does not divide into heads of {head}: put the config.json that tells the heads "
                   "beside the weights.")
  return heads or width // head


def _without_prefix(found: Iterable[str], sign: str) -> dict[str, str]:
  found = list(found)
  prefix = next((prefix for prefix in PREFIXES if any(
    name.startswith(f"{prefix}blocks.") and name.endswith(sign) for name in found)), "")
  # A name without the prefix is told as a leftover, even if it would be a good one.
  return {name: name.removeprefix(prefix) if name.startswith(prefix) else f"{name} (without {prefix})"
          for name in found}


def _without_unused(found: Iterable[str], sign: str) -> dict[str, str]:
  return encoder_names.used(name for name in found if not UNUSED.match(name))


def size_of(found: Shapes, naming: str, config: Mapping[str, Any]) -> Size:
  """The size of the transformer that has tensors of these names and shapes.

  config: of the config.json beside them, {} without one. Raises BadInput naming a tensor that is missed; the rest of
  the names and shapes remains to be compared with the table of this size.
  """
  column = pick(NAMINGS, naming, "naming")
  rows = {row[0]: row for row in [*RIM, *IMAGE_RIM, *POSITION_RIM]} | {f"blocks/{row[0]}": row for row in BLOCK}

  def shape(path: str, dims: int, ending: str = ".weight") -> tuple[int, ...]:
    return _shape(found, ("blocks.0." if path.startswith("blocks/") else "") + rows[path][column] + ending, dims)

  def has(path: str, ending: str = ".weight") -> bool:
    return rows[path][column] + ending in found

  width, seen, _, patch, _ = shape("patch_in", 5)
  channels = shape("head/out", 2)[0] // patch**2
  return Size(
    layers=_layers(found, "blocks.", config, "num_layers"), width=width,
    heads=_heads(config, ("num_attention_heads", "num_heads"), width, HEAD), mlp=shape("blocks/mlp/up", 2)[0],
    channels=channels, given=seen - channels, text_width=shape("text/up", 2)[1],
    text_tokens=_told(config, "text_len") or Size.text_tokens,
    image_width=shape("image/norm_in", 1)[0] if has("image/norm_in") else 0,
    image_positions=shape("image/positions", 3, "")[1] if has("image/positions", "") else 0,
    waves=shape("time_in", 2)[1], patch=patch)


def _heads_of_comfyui(size: Size, form: str) -> None:
  if form == "comfyui" and size.head_width != HEAD:
    raise BadInput(f"ComfyUI takes heads of width {HEAD} and these are {size.head_width} wide: choose another format.")


def diffusers_config(size: Size) -> dict[str, Any]:
  """The config.json that diffusers.WanTransformer3DModel.from_pretrained reads."""
  return {
    "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.35.0",
    "added_kv_proj_dim": size.width if size.image_width else None, "attention_head_dim": size.head_width,
    "cross_attn_norm": True, "eps": 1e-6, "ffn_dim": size.mlp, "freq_dim": size.waves,
    "image_dim": size.image_width or None, "in_channels": size.channels + size.given, "num_attention_heads": size.heads,
    "num_layers": size.layers, "out_channels": size.channels, "patch_size": [1, size.patch, size.patch],
    "pos_embed_seq_len": size.image_positions or None, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
    "text_dim": size.text_width}


def native_config(size: Size) -> dict[str, Any]:
  """The config.json that WanModel.from_pretrained of Wan 2.1 and 2.2 reads."""
  kind = "flf2v" if size.image_positions else "i2v" if size.given else "ti2v" if size.channels == 48 else "t2v"
  return {
    "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": size.width, "eps": 1e-6, "ffn_dim": size.mlp,
    "freq_dim": size.waves, "in_dim": size.channels + size.given, "model_type": kind, "num_heads": size.heads,
    "num_layers": size.layers, "out_dim": size.channels, "text_len": size.text_tokens}


def vae_size_of(found: Shapes, naming: str, config: Mapping[str, Any]) -> VAESize:
  """The size of the codec that has tensors of these names and shapes; otherwise as `size_of`."""
  column = pick(vae_names.NAMINGS, naming, "naming")
  rim = {part: {row[0]: row[column] + ".weight" for row in rows} for part, rows in vae_names.RIM.items()}
  encoder, pixel, *_ = _shape(found, rim["encoder"]["conv_in"], 5)
  channels = _shape(found, rim["decoder"]["latents"], 5)[0]
  start, end = {"native": ("encoder.downsamples.", ".residual.6.weight"),
                "diffusers": ("encoder.down_blocks.", ".conv2.weight")}[naming]
  ends = (end, ".resample.1.weight")
  layers = {name.removesuffix(end) for end in ends for name in found if name.startswith(start) and name.endswith(end)}

  def place(layer: str) -> tuple[int, ...]:
    """Its numbers; a step that has none of its own comes last."""
    return (*map(int, re.findall(r"\d+", layer)), *([len(found)] if layer.endswith("sampler") else []))

  levels, times = [[]], []
  for layer in sorted(layers, key=place):  # blocks of a level, then its step to the next
    if layer + end in found:
      levels[-1].append(_shape(found, layer + end, 5)[0] // encoder)
    else:
      levels.append([])
      times.append(f"{layer}.time_conv.weight" in found)
  if not all(levels):
    raise BadInput(f"level {levels.index([])} of the encoder has no blocks: fetch the file again.")
  widths = tuple(level[0] for level in levels)
  means, deviations = _latents(channels, config)
  return VAESize(
    encoder=encoder, decoder=_shape(found, rim["decoder"]["conv_out"], 5)[1] // max(1, widths[0]), widths=widths,
    means=means, deviations=deviations, time_steps=tuple(times), blocks=len(levels[0]),
    shortcuts=any(len(place(layer)) > 1 for layer in layers), patch=math.isqrt(pixel // 3))


def _latents(channels: int, config: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Means and deviations of latents: as told, else as published for so many channels."""
  told = [config.get(key) for key in ("latents_mean", "latents_std")]
  if None in told:
    told = next(([size.means, size.deviations] for size in VAE_SIZES.values() if size.channels == channels), None)
    if told is None:
      raise BadInput(f"no published codec has latents of {channels} channels: put the config.json that tells their "
                     "means and deviations beside the weights.")
  try:
    means, deviations = (tuple(map(float, numbers)) for numbers in told)
  except (TypeError, ValueError):
    raise BadInput("the means and deviations of its config.json are no numbers: fetch it again.") from None
  if {len(means), len(deviations)} != {channels}:
    raise BadInput(f"config.json tells {len(means)} means and {len(deviations)} deviations for latents of {channels} "
                   "channels: fetch both again.")
  return means, deviations


def _published_latents(size: VAESize, form: str) -> None:
  if form == "ours":
    raise BadInput("a codec is read here as it was published: choose wan, diffusers or comfyui.")
  known = [(other.means, other.deviations) for other in VAE_SIZES.values()]
  if form != "diffusers" and (size.means, size.deviations) not in known:
    raise BadInput(f"the format {form} has no place for means and deviations that are not the published ones: choose "
                   "diffusers.")


def vae_config(size: VAESize) -> dict[str, Any]:
  """The config.json that diffusers.AutoencoderKLWan.from_pretrained reads."""
  return {
    "_class_name": "AutoencoderKLWan", "_diffusers_version": "0.35.0", "attn_scales": [], "base_dim": size.encoder,
    "decoder_base_dim": size.decoder, "dim_mult": list(size.widths), "dropout": 0.0, "in_channels": size.pixel,
    "is_residual": size.shortcuts, "latents_mean": list(size.means), "latents_std": list(size.deviations),
    "num_res_blocks": size.blocks, "out_channels": size.pixel, "patch_size": size.patch if size.patch > 1 else None,
    "scale_factor_spatial": size.spatial, "scale_factor_temporal": size.temporal,
    "temperal_downsample": list(size.time_steps), "z_dim": size.channels}


def text_size_of(found: Shapes, naming: str, config: Mapping[str, Any]) -> TextSize:
  """The size of the text encoder that has tensors of these names and shapes; otherwise as `size_of`."""
  column = pick(encoder_names.NAMINGS, naming, "naming")
  start = {"native": "blocks.", "huggingface": "encoder.block."}[naming]
  rim, block = ({row[0]: row[column] + ".weight" for row in rows} for rows in (
    encoder_names.TEXT_RIM, encoder_names.TEXT_BLOCK))
  vocabulary, width = _shape(found, rim["embedding"], 2)
  buckets, heads = _shape(found, f"{start}0.{block['attention/distances']}", 2)
  return TextSize(
    layers=_layers(found, start, config, "num_layers"), width=width, heads=heads,
    head_width=_shape(found, f"{start}0.{block['attention/q']}", 2)[0] // heads,
    mlp=_shape(found, f"{start}0.{block['mlp/up']}", 2)[0], vocabulary=vocabulary, buckets=buckets,
    far=_told(config, "relative_attention_max_distance") or TextSize.far)


def text_config(size: TextSize) -> dict[str, Any]:
  """The config.json that transformers.UMT5EncoderModel.from_pretrained reads."""
  return {
    "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "d_ff": size.mlp, "d_kv": size.head_width,
    "d_model": size.width, "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True, "layer_norm_epsilon": 1e-6, "num_heads": size.heads, "num_layers": size.layers,
    "pad_token_id": 0, "relative_attention_max_distance": size.far, "relative_attention_num_buckets": size.buckets,
    "tie_word_embeddings": False, "vocab_size": size.vocabulary}


def image_size_of(found: Shapes, naming: str, config: Mapping[str, Any]) -> ImageSize:
  """The size of the image encoder that has tensors of these names and shapes; otherwise as `size_of`."""
  column = pick(encoder_names.NAMINGS, naming, "naming")
  start = {"native": "visual.transformer.", "huggingface": "vision_model.encoder.layers."}[naming]
  rim, block = ({row[0]: row[column] for row in rows} for rows in (
    encoder_names.IMAGE_RIM, encoder_names.IMAGE_BLOCK))
  width, _, patch, _ = _shape(found, rim["patch_in"] + ".weight", 4)
  positions = {"native": (rim["positions"], 3), "huggingface": (rim["positions"] + ".weight", 2)}[naming]
  return ImageSize(
    layers=_layers(found, start, config, "num_hidden_layers"), width=width,
    heads=_heads(config, ("num_attention_heads",), width, IMAGE_HEAD),
    mlp=_shape(found, f"{start}0.{block['mlp/up']}.weight", 2)[0], patch=patch,
    side=patch * math.isqrt(_shape(found, *positions)[-2] - 1))


def image_config(size: ImageSize) -> dict[str, Any]:
  """The config.json that transformers.CLIPVisionModel.from_pretrained reads."""
  return {
    "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": "gelu",
    "hidden_size": size.width, "image_size": size.side, "intermediate_size": size.mlp, "layer_norm_eps": 1e-5,
    "num_attention_heads": size.heads, "num_channels": 3, "num_hidden_layers": size.layers, "patch_size": size.patch}


def _no_encoder(size: TextSize | ImageSize, form: str) -> None:
  if form in ("ours", "comfyui"):
    raise BadInput(f"the format {form} is not for encoders, which are read here as they were published, and of which "
                   "ComfyUI has files of its own: choose wan or diffusers.")


KINDS = {
  "transformer": Kind(
    "transformer", {"native": ".self_attn.q.weight", "diffusers": ".attn1.to_q.weight"}, _without_prefix, size_of,
    entries, SIZES, ("WanModel", "WanTransformer3DModel"),
    {"ours": Form("ours"), "wan": Form("native", "diffusion_pytorch_model", native_config), "comfyui": Form("native"),
     "diffusers": Form("diffusers", "diffusion_pytorch_model", diffusers_config)},
    _heads_of_comfyui, r"modulation|norm|time_|positions|patch_in|head/"),
  "codec": Kind(
    "codec", {"native": "decoder.head.0.gamma", "diffusers": "decoder.norm_out.gamma"},
    lambda found, sign: {name: name for name in found}, vae_size_of, vae_names.entries, VAE_SIZES,
    ("AutoencoderKLWan",),
    {"wan": Form("native", "Wan_VAE"), "comfyui": Form("native"),
     "diffusers": Form("diffusers", "diffusion_pytorch_model", vae_config)}, _published_latents),
  "text": Kind(
    "text encoder", {"native": ".pos_embedding.embedding.weight",
                     "huggingface": ".SelfAttention.relative_attention_bias.weight"},
    _without_unused, text_size_of, encoder_names.text_entries, TEXT_SIZES, ("umt5",),
    {"wan": Form("native", "models_t5_umt5-xxl-enc"), "diffusers": Form("huggingface", "model", text_config)},
    _no_encoder, r"mlp/down"),  # which transformers keeps
  "image": Kind(
    "image encoder", {"native": "visual.patch_embedding.weight", "huggingface": "embeddings.patch_embedding.weight"},
    _without_unused, image_size_of, encoder_names.image_entries, IMAGE_SIZES, ("clip_vision_model",),
    {"wan": Form("native", "models_clip_open-clip-xlm-roberta-large-vit-huge-14"),
     "diffusers": Form("huggingface", "model", image_config)}, _no_encoder),
}
