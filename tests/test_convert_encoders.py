"""Codecs, text and image encoders are known by their tensors and go from one published form to another unchanged."""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import load_file, save_file
from test_encoders import IMAGE, TEXT, image_witness, native_image, native_text, tensors, text_witness
from test_vae import randomised, witness
from transformers import CLIPVisionModel, UMT5EncoderModel

from anisora_jax.checkpoints import weights
from anisora_jax.errors import BadInput
from anisora_jax.experiment import weights as sources
from anisora_jax.experiment.convert import Choice, convert
from anisora_jax.models.wan import encoder_names, image, published, text, vae_names
from anisora_jax.models.wan.vae_sizes import VAE_SIZES, VAESize

CODEC = replace(VAE_SIZES["wan21"], encoder=4, decoder=6)
CODEC22 = replace(VAE_SIZES["wan22"], encoder=6, decoder=4, blocks=1)
OTHER = VAESize(encoder=4, decoder=4, means=(0.5, 1.0), deviations=(2.0, 3.0), widths=(1, 3), time_steps=(False,))


def quiet(line: str) -> None:
  pass


@dataclass(frozen=True)
class Case:
  """A small network of others. native: diffusers' tensors by native names, without our tables."""

  size: object
  made: object
  whole: type


def _random(model: torch.nn.Module) -> torch.nn.Module:
  draw = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(torch.randn(p.shape, generator=draw) / 8)
  return model.eval()


@cache
def case(name: str) -> Case:
  if name in ("codec", "codec22", "other"):
    size = {"codec": CODEC, "codec22": CODEC22, "other": OTHER}[name]
    return Case(size, randomised(size), AutoencoderKLWan)
  if name == "text":
    return Case(TEXT, _random(text_witness(TEXT)).bfloat16(), UMT5EncoderModel)
  size = replace(IMAGE, width=160, heads=2)
  return Case(size, _random(image_witness(size)).half(), CLIPVisionModel)


CASES = ("codec", "codec22", "text", "image")


def state(folder: Path) -> dict[str, torch.Tensor]:
  return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


def same(a: dict, b: dict) -> bool:
  return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", [*CASES, "other"])
def test_the_size_is_found_from_names_and_shapes(name, tmp_path):
  made = case(name)
  made.made.save_pretrained(tmp_path / "source")
  found = sources.find(tmp_path / "source", kinds=tuple(published.KINDS.values()))[""]
  assert found.size == made.size
  if name != "other":
    convert(tmp_path / "source", tmp_path / "wan", "wan", say=quiet)
    assert not (tmp_path / "wan" / "config.json").exists()
    again = sources.find(tmp_path / "wan", kinds=tuple(published.KINDS.values()))[""]
    assert (again.size, again.naming) == (made.size, "native")


PUBLISHED = [("codec", VAE_SIZES, vae_names.entries), ("text", text.TEXT_SIZES, encoder_names.text_entries),
             ("image", image.IMAGE_SIZES, encoder_names.image_entries)]


@pytest.mark.parametrize(("kind", "name", "size", "entries"), [
  (kind, name, size, entries) for kind, sizes, entries in PUBLISHED for name, size in sizes.items()])
def test_every_published_size_is_known_by_either_naming(kind, name, size, entries):
  for naming in published.KINDS[kind].signs:
    shapes = {entry.name: entry.torch_shape() for entry in entries(size, naming)}
    known = published.recognise(shapes)
    assert known[:2] == (published.KINDS[kind], naming)
    assert known[0].size_of(shapes, naming, {}) == size and published.title(known[0], size) == name


@pytest.mark.parametrize("name", CASES)
def test_each_comes_home_bit_by_bit_and_is_loaded_by_its_library(name, tmp_path):
  made = case(name)
  made.made.save_pretrained(tmp_path / "source", max_shard_size="20KB")
  before = state(tmp_path / "source")
  convert(tmp_path / "source", tmp_path / "wan", "wan", shard=2e4, say=quiet)
  convert(tmp_path / "wan", tmp_path / "back", "diffusers", shard=2e4, say=quiet)
  assert len(list((tmp_path / "wan").iterdir())) > 2 and len(list((tmp_path / "back").iterdir())) > 3
  after = state(tmp_path / "back")
  known = encoder_names.used(before) if name in ("text", "image") else {key: key for key in before}
  assert same({known[key]: x for key, x in before.items()}, after)
  if name == "codec":
    assert same(convert_wan_vae_to_diffusers(state(tmp_path / "wan")), after)
  if name in ("text", "image"):
    native = {"text": native_text, "image": native_image}[name](tensors(made.made))
    assert same({key: x.contiguous() for key, x in native.items()}, state(tmp_path / "wan"))
  loaded, told = made.whole.from_pretrained(tmp_path / "back", output_loading_info=True, torch_dtype=made.made.dtype)
  assert not any(told.values()), told
  assert same(dict(loaded.state_dict()), dict(made.made.state_dict()))
  own = {"_name_or_path", "_diffusers_version", "_use_default_values", "transformers_version", "architectures", "dtype",
         "torch_dtype", "scale_decoder_outputs"}  # the last is of a decoder, which none of these has
  here, there = ({key: list(x) if isinstance(x, tuple) else x for key, x in dict(
    model.config if name.startswith("codec") else model.config.to_dict()).items() if key not in own}
    for model in (loaded, made.made))
  assert here == there
  with torch.no_grad():
    if name.startswith("codec"):
      frames = torch.randn(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(1))
      assert torch.allclose(*(net.encode(frames).latent_dist.mean for net in (loaded, made.made)), rtol=1e-5, atol=1e-6)
    elif name == "text":
      ids = torch.arange(9)[None]
      assert torch.allclose(*(net.float()(ids).last_hidden_state for net in (loaded, made.made)), rtol=1e-5, atol=1e-6)
    else:
      seen = torch.randn(1, 3, 30, 30, generator=torch.Generator().manual_seed(1))
      assert torch.allclose(*(net.float()(seen).last_hidden_state for net in (loaded, made.made)), rtol=1e-5, atol=1e-6)
  case.cache_clear()  # what float() has widened


@pytest.mark.parametrize("name", ["codec", "codec22"])
def test_comfyui_reads_one_file_of_native_names(name, tmp_path):
  case(name).made.save_pretrained(tmp_path / "source")
  convert(tmp_path / "source", tmp_path / "wan", "wan", say=quiet)
  convert(tmp_path / "source", tmp_path / "codec", "comfyui", say=quiet)
  assert [path.name for path in (tmp_path / "codec").iterdir()] == ["codec.safetensors"]
  assert same(load_file(tmp_path / "codec" / "codec.safetensors"), state(tmp_path / "wan"))


def test_files_as_wan_and_comfyui_publish_them_are_read_and_what_is_unused_is_told(tmp_path):
  lines = []
  clip = {**native_image(tensors(case("image").made)), "textual.token_embedding.weight": torch.zeros(3, 2),
          "log_scale": torch.zeros(()), "visual.head": torch.zeros(2, 2)}
  torch.save(clip, tmp_path / "models_clip.pth")
  convert(tmp_path / "models_clip.pth", tmp_path / "clip", "diffusers", say=lines.append)
  assert same(state(tmp_path / "clip"), tensors(case("image").made))
  assert "image encoder" in lines[0] and "3 tensors that Wan does not use are left out" in lines[0]
  made = {**tensors(case("text").made), "spiece_model": torch.zeros(7, dtype=torch.uint8)}
  save_file({name: x.contiguous() for name, x in made.items()}, tmp_path / "umt5.safetensors")
  convert(tmp_path / "umt5.safetensors", tmp_path / "text", "diffusers", "float32", say=quiet)
  assert same(state(tmp_path / "text"), {name: x.float() for name, x in tensors(case("text").made).items()})


def test_what_names_and_shapes_do_not_tell_comes_from_config_json(tmp_path):
  size = replace(IMAGE, width=24, heads=3)
  image_witness(size).save_pretrained(tmp_path / "image")
  far = replace(TEXT, far=77)
  text_witness(far).save_pretrained(tmp_path / "text")
  witness(OTHER).save_pretrained(tmp_path / "codec")
  for name in ("image", "text", "codec"):
    convert(tmp_path / name, tmp_path / f"{name} again", "diffusers", say=quiet)
  assert CLIPVisionModel.from_pretrained(tmp_path / "image again").config.num_attention_heads == 3
  assert UMT5EncoderModel.from_pretrained(tmp_path / "text again").config.relative_attention_max_distance == 77
  told = AutoencoderKLWan.from_pretrained(tmp_path / "codec again").config
  assert (told.latents_mean, told.latents_std, list(told.dim_mult)) == ([0.5, 1.0], [2.0, 3.0], [1, 3])


def test_transformers_half_precision_with_its_wide_products_is_kept(tmp_path):
  text_witness(TEXT).save_pretrained(tmp_path / "wide")
  UMT5EncoderModel.from_pretrained(tmp_path / "wide", torch_dtype=torch.float16).save_pretrained(tmp_path / "half")
  assert {x.dtype for x in state(tmp_path / "half").values()} == {torch.float16, torch.float32}
  convert(tmp_path / "half", tmp_path / "wan", "wan", say=quiet)
  convert(tmp_path / "wan", tmp_path / "back", "diffusers", say=quiet)
  assert same(state(tmp_path / "back"), state(tmp_path / "half"))


def _config(folder: Path, **changes) -> None:
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _without(folder: Path, *parts: str) -> None:
  path = next(folder.glob("*.safetensors"))
  save_file({name: x for name, x in load_file(path).items() if not all(part in name for part in parts)}, path)


BAD = {  # network, format, what is done to its folder, words of the line
  "ours": ("codec", "ours", lambda f: None, "a codec is read here as it was published: choose wan, diffusers or comf"),
  "text ours": ("text", "ours", lambda f: None, "the format ours is not for encoders"),
  "image in comfyui": ("image", "comfyui", lambda f: None, "the format comfyui is not for encoders"),
  "own means": ("other", "wan", lambda f: None, "wan has no place for means and deviations that are not the published"),
  "no means": ("other", "diffusers", lambda f: (f / "config.json").unlink(), "latents of 2 channels: put the config"),
  "means amiss": ("codec", "wan", lambda f: _config(f, latents_mean=[1.0]), "1 means and 16 deviations for latents"),
  "no numbers": ("codec", "wan", lambda f: _config(f, latents_std="x"), "means and deviations .* are no numbers"),
  "heads": ("image", "wan", lambda f: _config(f, num_attention_heads=7), "a width of 160 into 7 heads"),
  "layers": ("text", "wan", lambda f: _config(f, num_layers=4), "tells of 4 layers and there are 3"),
  "codec without a block": ("codec", "wan", lambda f: _without(f, "encoder.down_blocks.3.", "conv2"),
                            "missing tensors: encoder.down_blocks.3.conv2.weight"),
  "codec without a level": ("codec22", "wan", lambda f: _without(f, "encoder.down_blocks.1.resnets", "conv2"),
                            "level 1 of the encoder has no blocks"),
  "text without a layer": ("text", "wan", lambda f: _without(f, "block.1", "SelfAttention.q"), "missing tensors: .*bl"),
  "image without its class": ("image", "wan", lambda f: _without(f, "class_embedding"), "missing .*class_embed"),
  "flat": ("codec", "wan", lambda f: save_file({"decoder.norm_out.gamma": torch.zeros(1)}, next(f.glob("*.safetens*"))),
           "missing tensors: encoder.conv_in.weight"),
  "adapters": ("image", "wan", lambda f: None, "x.safetensors is for a transformer and .* another kind, image encoder"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_one_line_and_leaves_nothing(name, tmp_path):
  network, form, change, words = BAD[name]
  case(network).made.save_pretrained(tmp_path / "source")
  change(tmp_path / "source")
  with pytest.raises(BadInput, match=words) as mistake:
    convert(tmp_path / "source", tmp_path / "to", form, choice=Choice(
      loras=["x.safetensors"] if name == "adapters" else []), say=quiet)
  assert "\n" not in str(mistake.value) and not (tmp_path / "to").exists()


def test_a_run_takes_transformers_alone(tmp_path):
  case("codec").made.save_pretrained(tmp_path)
  with pytest.raises(BadInput, match="weights of a Wan codec and those of a transformer are wanted"):
    sources.find(tmp_path)
  assert weights.find(tmp_path) and np.dtype(np.float32) in {x.dtype for x in weights.find(tmp_path).values()}
