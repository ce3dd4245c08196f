"""Weights of eight bits are worth what torch and their scales say, whoever reads them; what is unclear is refused."""

import json

import jax
import numpy as np
import pytest
import torch
from compare import apart
from safetensors.torch import load_file, save_file
from test_convert import TEXT, abstract, model, quiet, state
from test_encoders import TEXT as UMT5
from test_encoders import tensors as published_names
from test_encoders import text_witness
from transformers import UMT5EncoderModel

from anisora_jax.checkpoints import weights
from anisora_jax.errors import BadInput
from anisora_jax.experiment import weights as sources
from anisora_jax.experiment.convert import Choice, convert
from anisora_jax.models import names
from anisora_jax.models.wan.names import entries

KINDS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
KEPT = ("norm", "bias", "modulation", "scale_shift", "embedding")  # what publishers of scaled files leave wide


def native(tmp_path) -> dict[str, torch.Tensor]:
  model(TEXT).save_pretrained(tmp_path / "source")
  convert(tmp_path / "source", tmp_path / "wan", "wan", say=quiet)
  return state(tmp_path / "wan")


def scaled(tensors: dict, spelling: str, rows: bool, ones: tuple[int, ...]) -> tuple[dict, dict]:
  """(a scaled file's tensors, what they are worth in float32): matrices to eight bits, the rest in bfloat16."""
  file, worth = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
  for name, x in tensors.items():
    if x.ndim == 2 and name.endswith(".weight") and not any(word in name for word in KEPT):
      scale = (x.abs().amax(1) if rows else x.abs().max()) / 448
      shape = (len(x), *ones) if rows else ones
      file[name] = (x / scale.reshape(-1, 1)).to(torch.float8_e4m3fn)
      module = name.removesuffix(".weight")
      file[module + spelling] = scale.reshape(shape)
      worth[name] = file[name].float() * scale.reshape(-1, 1)
      hint = {".scale_weight": ".scale_input", ".weight_scale": ".input_scale"}[spelling]
      file[module + hint] = torch.ones(())
      if spelling == ".weight_scale":
        file[module + ".comfy_quant"] = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()),
                                                     dtype=torch.uint8)
    else:
      file[name] = x.bfloat16()
      worth[name] = file[name].float()
  return file, worth


@pytest.mark.parametrize("kind", KINDS)
def test_plain_eight_bits_are_cast_up(kind, tmp_path):
  small = {name: x.to(KINDS[kind]) for name, x in native(tmp_path).items()}
  save_file(small, tmp_path / "small.safetensors")
  for dtype, there in (("", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)):
    convert(tmp_path / "small.safetensors", tmp_path / f"to {dtype}", "wan", dtype, say=quiet)
    got = state(tmp_path / f"to {dtype}")
    assert got.keys() == small.keys() and all(torch.equal(got[name], x.to(there)) for name, x in small.items())
    assert {x.dtype for x in got.values()} == {there}


@pytest.mark.parametrize("spelling", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(("rows", "ones"), [(False, ()), (False, (1,)), (True, ()), (True, (1,))])
def test_scaled_files_are_worth_number_times_scale(spelling, prefix, rows, ones, tmp_path):
  file, worth = scaled(native(tmp_path), spelling, rows, ones)
  assert len(file) > len(worth) + 20
  save_file({prefix + name: x for name, x in file.items()}, tmp_path / "small.safetensors")
  convert(tmp_path / "small.safetensors", tmp_path / "to", "wan", say=quiet)
  got = state(tmp_path / "to")
  assert got.keys() == worth.keys() and all(torch.equal(got[name], x.bfloat16()) for name, x in worth.items())
  convert(tmp_path / "small.safetensors", tmp_path / "wide", "wan", "float32", say=quiet)
  got = state(tmp_path / "wide")
  assert all(torch.equal(got[name], x) for name, x in worth.items())


def test_a_mesh_and_adapters_get_the_exact_worth(tmp_path):
  file, worth = scaled(native(tmp_path), ".scale_weight", False, ())
  save_file(file, tmp_path / "small.safetensors")
  got = sources.read(sources.source(tmp_path / "small.safetensors", TEXT), abstract(TEXT))
  want = names.from_torch({name: x.numpy() for name, x in worth.items()}, entries(TEXT, "native"))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  up, down = torch.randn(TEXT.width, 2), torch.randn(2, TEXT.width)
  save_file({"diffusion_model.blocks.1.self_attn.q.lora_up.weight": up,
             "diffusion_model.blocks.1.self_attn.q.lora_down.weight": down}, tmp_path / "lora.safetensors")
  convert(tmp_path / "small.safetensors", tmp_path / "to", "wan", "float32",
          choice=Choice(loras=[str(tmp_path / "lora.safetensors")]), say=quiet)
  got, name = state(tmp_path / "to"), "blocks.1.self_attn.q.weight"
  assert apart(got[name], worth[name] + up @ down) < 1e-6


def test_comfyui_s_scaled_text_encoder_is_read(tmp_path):
  file, worth = scaled(published_names(text_witness(UMT5)), ".scale_weight", False, ())
  save_file(file | {"spiece_model": torch.zeros(5, dtype=torch.uint8)}, tmp_path / "umt5.safetensors")
  convert(tmp_path / "umt5.safetensors", tmp_path / "to", "diffusers", "float32", say=quiet)
  loaded = UMT5EncoderModel.from_pretrained(tmp_path / "to").state_dict()
  assert all(torch.equal(loaded[name], x) for name, x in worth.items())


Q = "blocks.1.self_attn.q"
BAD = {  # what is put into a scaled file, words of the line
  "blocks": ({Q + ".scale_weight": torch.ones(8, 8)}, r"scale_weight has shape \(8, 8\), and one number or one"),
  "two scales": ({Q + ".weight_scale": torch.ones(())}, "has two scales, .*scale_weight and .*weight_scale"),
  "scale of a wide weight": ({"blocks.1.norm3.scale_weight": torch.ones(())}, "names: blocks.1.norm3.scale_weight"),
  "scale of nothing": ({"blocks.9.self_attn.q.scale_weight": torch.ones(())}, "names: blocks.9.self_attn.q.scale_w"),
  "an unknown companion": ({Q + ".scale_output": torch.ones(())}, "no table row names: .*q.scale_output"),
  "an unknown format": ({Q + ".comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)},
                        "q is stored as mxfp8, and float8_e4m3fn or float8_e5m2 can be read"),
  "no format": ({Q + ".comfy_quant": torch.zeros(3, dtype=torch.uint8)}, "comfy_quant cannot be read"),
  "integers": ({Q + ".weight": torch.zeros(128, 128, dtype=torch.int8)}, "no table row names: .*self_attn.q.scale"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_unclear_is_refused_in_one_line(name, tmp_path):
  more, words = BAD[name]
  save_file(scaled(native(tmp_path), ".scale_weight", False, ())[0] | more, tmp_path / "small.safetensors")
  with pytest.raises(BadInput, match=words) as mistake:
    convert(tmp_path / "small.safetensors", tmp_path / "to", "wan", say=quiet)
  assert "\n" not in str(mistake.value) and str(tmp_path / "small.safetensors") in str(mistake.value)
  assert not (tmp_path / "to").exists()


def test_numbers_beyond_float16_and_markers_of_nothing_are_refused(tmp_path):
  tensors = native(tmp_path)
  large, _ = scaled(tensors, ".scale_weight", False, ())
  save_file(large | {Q + ".scale_weight": torch.tensor(200.0)}, tmp_path / "large.safetensors")
  with pytest.raises(BadInput, match="beyond what float16 holds"):
    convert(tmp_path / "large.safetensors", tmp_path / "to", "wan", "float16", say=quiet)
  save_file(tensors | {"scaled_fp8": torch.zeros(2)}, tmp_path / "wide.safetensors")
  with pytest.raises(BadInput, match="no table row names: scaled_fp8"):
    convert(tmp_path / "wide.safetensors", tmp_path / "to", "wan", say=quiet)
  assert "scaled_fp8" in weights.find(tmp_path / "wide.safetensors")
  assert load_file(tmp_path / "wide.safetensors").keys() == weights.find(tmp_path / "wide.safetensors").keys()
