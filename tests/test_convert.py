"""Weights come from every published form and go back bit by bit; what is wrong is one line and leaves nothing."""

import json
import os
import pickle
import signal
import subprocess
import sys
import tracemalloc
import weakref
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compare import apart
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.loaders import lora_conversion_utils
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from flax.traverse_util import unflatten_dict
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from anisora_jax import errors
from anisora_jax.adapters import files, lora
from anisora_jax.checkpoints import tensor_file, weights
from anisora_jax.checkpoints.orbax import Checkpoints
from anisora_jax.errors import BadInput
from anisora_jax.experiment import weights as sources
from anisora_jax.experiment.convert import Choice, convert
from anisora_jax.models import names
from anisora_jax.models.wan import placement as rules
from anisora_jax.models.wan.names import NAMINGS, entries
from anisora_jax.models.wan.sizes import SIZES, Size
from anisora_jax.parallel import mesh, placement

TEXT = Size(layers=2, width=128, heads=1, mlp=24, text_width=20)
VARIANTS = {
  "t2v": TEXT,
  "i2v": replace(TEXT, given=20, image_width=28),
  "flf2v": replace(TEXT, given=20, image_width=28, image_positions=6),
  "wan22_i2v": replace(TEXT, given=20),
  "ti2v": replace(TEXT, channels=48),
}
DTYPES = dict(zip(VARIANTS, [torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.bfloat16], strict=True))


def quiet(line: str) -> None:
  pass


@cache
def model(size: Size, dtype=torch.float32, seed: int = 0) -> WanTransformer3DModel:
  made = WanTransformer3DModel(
    num_attention_heads=size.heads, attention_head_dim=size.head_width, in_channels=size.channels + size.given,
    out_channels=size.channels, text_dim=size.text_width, freq_dim=size.waves, ffn_dim=size.mlp,
    num_layers=size.layers, image_dim=size.image_width or None,
    added_kv_proj_dim=size.width if size.image_width else None, pos_embed_seq_len=size.image_positions or None)
  draw = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for p in made.parameters():
      p.copy_(torch.randn(p.shape, generator=draw) / 8)
  return made.to(dtype).eval()


def state(folder: Path) -> dict[str, torch.Tensor]:
  """All tensors of a folder, read by the safetensors library."""
  return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


def loaded_from(folder: Path, dtype=torch.float32) -> WanTransformer3DModel:
  return WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)


@torch.no_grad()
def velocity(net: torch.nn.Module, size: Size) -> torch.Tensor:
  """What a network says of some latents, in f32: half precision has no kernels for all of it here."""
  draw = torch.Generator().manual_seed(1)
  frames = 2 if size.image_positions else 1  # the witness takes the tokens of both frames as two of the batch
  image = torch.randn(frames, size.image_positions // frames or 3, size.image_width, generator=draw)
  inputs = (torch.randn(1, size.channels + size.given, 1, 4, 4, generator=draw), torch.tensor([500.0]),
            torch.randn(1, 512, size.text_width, generator=draw), image if size.image_width else None)
  return deepcopy(net).float()(*inputs).sample


def same(a: dict, b: dict) -> bool:
  return a.keys() == b.keys() and all(
    a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", params=VARIANTS)
def published(request, tmp_path_factory):
  """(name, size, the model, its folders: as diffusers saves it in shards, then each made of the one before)."""
  made, root = model(VARIANTS[request.param], DTYPES[request.param]), tmp_path_factory.mktemp(request.param)
  made.save_pretrained(root / "source", max_shard_size="400KB")
  convert(root / "source", root / "wan", "wan", shard=4e5, say=quiet)
  convert(root / "wan", root / "comfyui", "comfyui", say=quiet)
  convert(root / "comfyui", root / "ours", "ours", say=quiet)
  return request.param, VARIANTS[request.param], made, root


def test_every_variant_comes_home_bit_by_bit_through_every_format(published, tmp_path):
  name, _, made, root = published
  convert(root / "ours", tmp_path / "back", "diffusers", shard=4e5, say=quiet)
  convert(root / "ours", tmp_path / "native", "wan", say=quiet)
  assert all(len(list((root / folder).glob("*.safetensors"))) > 2 for folder in ("source", "wan"))
  assert same(state(tmp_path / "back"), dict(made.state_dict()))
  assert same(state(tmp_path / "native"), state(root / "wan")) and same(state(root / "comfyui"), state(root / "wan"))
  if name != "flf2v":  # whose position embedding diffusers' own conversion does not know
    assert same(convert_wan_transformer_to_diffusers(dict(state(root / "wan"))), dict(made.state_dict()))


def test_diffusers_loads_what_we_write_and_says_the_same(published, tmp_path):
  _, size, made, root = published
  convert(root / "wan", tmp_path / "back", "diffusers", shard=4e5, say=quiet)
  loaded = loaded_from(tmp_path / "back", made.dtype)
  own = {"_name_or_path", "_diffusers_version", "_use_default_values"}
  assert {k: v for k, v in loaded.config.items() if k not in own} == \
    {k: list(v) if isinstance(v, tuple) else v for k, v in made.config.items() if k not in own}
  assert same(dict(loaded.float().state_dict()), dict(deepcopy(made).float().state_dict()))
  # Not to the bit: how a mapped file lies in memory decides in which order kernels add.
  assert apart(velocity(loaded, size), velocity(made, size)) < 1e-5


def test_our_files_are_the_librarys_and_the_librarys_are_ours(tmp_path):
  draw = np.random.default_rng(0)
  arrays = {f"{code} tensor/é": draw.integers(0, 2, (3, 1, 5)).astype(dtype) for code, dtype in
            tensor_file.DTYPES.items()} | {"empty": np.zeros((0, 3), np.float32), "long": draw.normal(size=3 * 2**20)}
  places = tensor_file.create(tmp_path / "ours.safetensors", {name: (x.dtype, x.shape) for name, x in arrays.items()})
  room = memoryview(bytearray(tensor_file.PIECE))
  for name, x in arrays.items():
    made = tensor_file.Made(x.dtype, x.shape, lambda x=x: x)
    assert tensor_file.fill(places[name], made.pieces(room)) == tensor_file.crc32(places[name].pieces(room))
  theirs = load_file(tmp_path / "ours.safetensors")
  save_file(theirs, tmp_path / "theirs.safetensors", {"note": "metadata is no tensor"})
  again = tensor_file.read(tmp_path / "theirs.safetensors")
  assert theirs.keys() == again.keys() == arrays.keys()
  for name, x in arrays.items():
    assert theirs[name].contiguous().view(torch.uint8).numpy().tobytes() == x.tobytes() == again[name].view().tobytes()
    assert (again[name].dtype, again[name].shape) == (x.dtype, x.shape)
    assert b"".join(map(bytes, again[name].pieces(room))) == x.tobytes() and places[name].offset % x.dtype.itemsize == 0
  with safe_open(tmp_path / "ours.safetensors", "pt") as file:
    assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_a_comfyui_file_may_carry_a_prefix(prefix, tmp_path):
  made = model(TEXT)
  made.save_pretrained(tmp_path / "source")
  convert(tmp_path / "source", tmp_path / "wan", "wan", say=quiet)
  save_file({prefix + name: x for name, x in state(tmp_path / "wan").items()}, tmp_path / "film.safetensors")
  convert(tmp_path / "film.safetensors", tmp_path / "back", "diffusers", say=quiet)
  assert same(state(tmp_path / "back"), dict(made.state_dict()))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_tensors_alone_is_read(zipped, tmp_path):
  made = model(TEXT, torch.bfloat16)
  torch.save(made.state_dict(), tmp_path / "film.pth", _use_new_zipfile_serialization=zipped)
  convert(tmp_path / "film.pth", tmp_path / "back", "diffusers", say=quiet)
  assert same(state(tmp_path / "back"), dict(made.state_dict()))


def test_two_experts_stay_two_under_the_names_of_each_format(tmp_path):
  made = [model(VARIANTS["wan22_i2v"], torch.bfloat16, seed) for seed in (0, 1)]
  for folder, expert in zip(("transformer", "transformer_2"), made, strict=True):
    expert.save_pretrained(tmp_path / "0" / folder)
  for number, form in enumerate(["wan", "comfyui", "ours", "diffusers"]):
    convert(tmp_path / str(number), tmp_path / str(number + 1), form, say=quiet)
  assert [sorted(path.name for path in (tmp_path / str(number)).iterdir()) for number in (1, 2, 3)] == [
    ["high_noise_model", "low_noise_model"], ["2_high_noise.safetensors", "2_low_noise.safetensors"],
    ["high_noise", "low_noise"]]
  for folder, expert in zip(("transformer", "transformer_2"), made, strict=True):
    assert same(state(tmp_path / "4" / folder), dict(expert.state_dict()))


def test_a_run_gives_its_parameters_or_their_average(tmp_path):
  size = SIZES["tiny"]
  trees = [names.from_torch({name: x.numpy() for name, x in model(size, seed=seed).state_dict().items()},
                            entries(size, "diffusers")) for seed in (0, 1)]
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text(json.dumps({"model": {"size": "tiny"}, "lora": {"rank": 0}}))
  with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
    checkpoints.save(3, {"step": jnp.int32(3), "params": trees[0], "ema": trees[1], "opt": (jnp.ones(2), {})}, {}, {})
  for ema, seed in ((False, 0), (True, 1)):
    convert(tmp_path / "run", tmp_path / str(seed), "diffusers", choice=Choice(ema), say=quiet)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / str(seed)).state_dict()
    assert same(dict(loaded), dict(model(size, seed=seed).state_dict()))


LORA = lora.Lora(rank=2, alpha=3.0)


def drawn_adapters(size: Size, seed: int = 0) -> dict:
  """Adapters of all that `Lora` meets by default, large enough to be seen."""
  shapes = unflatten_dict({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in
                           names.shapes(entries(size, "native")).items()}, sep="/")
  draw = np.random.default_rng(seed)
  return jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32) / 4,
                      jax.eval_shape(lambda: lora.begin(LORA, shapes, jax.random.key(0))))


def lora_file(path: Path, size: Size, form: str, **more: torch.Tensor) -> Path:
  tensors = files.write(drawn_adapters(size), LORA.scale, {naming: entries(size, naming) for naming in NAMINGS}, form)
  path.parent.mkdir(exist_ok=True)
  save_file({name: torch.tensor(x) for name, x in tensors.items()} | more, path)
  return path


READERS = {  # format -> how diffusers reads it: its own renaming, the prefix that is left
  "diffusers": (lambda x: x, "transformer"), "peft": (lambda x: x, "base_model.model"),
  "comfyui": (lora_conversion_utils._convert_non_diffusers_wan_lora_to_diffusers, "transformer"),
  "kohya": (lora_conversion_utils._convert_musubi_wan_lora_to_diffusers, "transformer"),
}


@pytest.mark.parametrize("form", files.FORMATS)
def test_adapters_merged_into_weights_say_what_diffusers_says_with_them_beside(form, tmp_path):
  size, made = VARIANTS["i2v"], model(VARIANTS["i2v"])
  more = {"diffusion_model.blocks.1.ffn.0.diff_b": torch.linspace(-1, 1, size.mlp)} if form == "comfyui" else {}
  file = lora_file(tmp_path / "style.safetensors", size, form, **more)
  made.save_pretrained(tmp_path / "base")
  convert(tmp_path / "base", tmp_path / "to", "diffusers", choice=Choice(loras=[str(file)], scale=0.5), say=quiet)
  rename, prefix = READERS[form]
  beside = deepcopy(made)
  beside.load_lora_adapter(rename(load_file(file)), prefix=prefix, adapter_name="style")
  beside.set_adapters(["style"], [0.5])
  theirs = velocity(beside, size)
  assert apart(velocity(made, size), theirs) > 0.01
  assert apart(velocity(loaded_from(tmp_path / "to"), size), theirs) < 1e-5


@pytest.mark.parametrize("writer", ["peft", "diffusers"])
def test_the_alpha_that_peft_and_diffusers_write_beside_adapters_counts(writer, tmp_path):
  made, torch_draw = deepcopy(model(TEXT)), torch.Generator().manual_seed(2)
  settings = LoraConfig(r=2, lora_alpha=7, target_modules=["to_q", "ffn.net.0.proj"], lora_bias=True)
  made.save_pretrained(tmp_path / "base")
  tuned = get_peft_model(made, settings)
  with torch.no_grad():
    for name, p in tuned.named_parameters():
      if "lora_" in name:
        p.copy_(torch.randn(p.shape, generator=torch_draw) / 4)
  if writer == "peft":
    tuned.save_pretrained(tmp_path / "lora")
  else:
    WanPipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(tuned),
                                  transformer_lora_adapter_metadata=tuned.peft_config["default"].to_dict())
    found = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    found = {name.replace("transformer.base_model.model.", "transformer."): x for name, x in found.items()}
    with safe_open(tmp_path / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
      save_file(found, tmp_path / "lora" / "pytorch_lora_weights.safetensors", file.metadata())
  convert(tmp_path / "base", tmp_path / "to", "diffusers", choice=Choice(loras=[str(tmp_path / "lora")]), say=quiet)
  assert apart(velocity(loaded_from(tmp_path / "to"), TEXT), velocity(tuned, TEXT)) < 1e-5


def tuned_run(folder: Path, base: Path, **model: str) -> tuple[dict, dict]:
  """The folder of a run that trained adapters beside a base; the adapters and their average."""
  trees = [drawn_adapters(SIZES["tiny"], seed) for seed in (0, 1)]
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps({
    "model": {"size": "tiny", "weights": str(base), "expert": "", "adapters": "", **model}, "pretrained": "",
    "lora": {"rank": LORA.rank, "alpha": LORA.alpha}}))
  with Checkpoints(folder / "checkpoints") as checkpoints:
    checkpoints.save(3, {"step": jnp.int32(3), "params": trees[0], "ema": trees[1], "opt": (jnp.ones(2), {})}, {}, {})
  return tuple(trees)


@pytest.mark.parametrize("form", ["source", "ours"])
def test_a_run_of_adapters_gives_its_base_with_them(form, tmp_path):
  size = SIZES["tiny"]
  made = model(size, torch.bfloat16)
  made.save_pretrained(tmp_path / "source")
  convert(tmp_path / "source", tmp_path / "ours", "ours", say=quiet)
  trees = tuned_run(tmp_path / "run", tmp_path / form)
  tensors, table = {name: x.float().numpy() for name, x in made.state_dict().items()}, entries(size, "diffusers")
  base = names.from_torch(tensors, table)
  for ema, tree in zip((False, True), trees, strict=True):
    want = names.to_torch(jax.tree.map(np.asarray, lora.merge(base, tree, LORA.scale)), table)
    convert(tmp_path / "run", tmp_path / f"f32 {ema}", "diffusers", "float32", choice=Choice(ema), say=quiet)
    got = state(tmp_path / f"f32 {ema}")
    assert max(apart(got[name], x) for name, x in want.items()) < 1e-6
    assert same(dict(loaded_from(tmp_path / f"f32 {ema}").state_dict()), got)
  for number, kept in enumerate(["wan", "ours", "diffusers"]):
    source = tmp_path / str(number - 1) if number else tmp_path / "run"
    convert(source, tmp_path / str(number), kept, choice=Choice(not number), say=quiet)
  assert same(state(tmp_path / "2"), {name: x.bfloat16() for name, x in got.items()})
  with pytest.raises(BadInput, match="holds adapters and no whole network: convert it to the format ours"):
    sources.find(tmp_path / "run")
  (tmp_path / "source").rename(tmp_path / "elsewhere")
  (tmp_path / "ours").rename(tmp_path / "elsewhere" / "ours")
  with pytest.raises(BadInput, match=r"holds adapters, and of the weights beside which they .*does not exist"):
    convert(tmp_path / "run", tmp_path / "no", "wan", say=quiet)


def test_a_run_of_adapters_has_the_base_that_it_trained_on(tmp_path):
  """The expert that its config names, with the adapters that were folded in first."""
  size, table = SIZES["tiny"], entries(SIZES["tiny"], "diffusers")
  for folder, seed in (("transformer", 0), ("transformer_2", 1)):
    model(size, seed=seed).save_pretrained(tmp_path / "pair" / folder)
  first, other = (lora_file(tmp_path / f"{name}.safetensors", size, "kohya") for name in ("first", "other"))
  trees = tuned_run(tmp_path / "run", tmp_path / "pair", expert="low_noise",
                    adapters=f"low_noise:{first}=0.5,high_noise:{other}=0.25")
  base = names.from_torch({name: x.numpy() for name, x in model(size, seed=1).state_dict().items()}, table)
  base = lora.merge(base, drawn_adapters(size), 0.5 * LORA.scale)
  want = names.to_torch(jax.tree.map(np.asarray, lora.merge(base, trees[0], LORA.scale)), table)
  convert(tmp_path / "run", tmp_path / "to", "diffusers", say=quiet)
  got = state(tmp_path / "to")
  assert max(apart(got[name], x) for name, x in want.items()) < 1e-6


def test_merging_holds_few_tensors_at_once(tmp_path, monkeypatch):
  model(SIZES["tiny"]).save_pretrained(tmp_path / "base")
  tuned_run(tmp_path / "run", tmp_path / "base")
  alive, most, cast = weakref.WeakSet(), [0], tensor_file.cast

  class Watched(np.ndarray):
    pass

  def watched(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    made = cast(array, dtype).view(Watched)
    alive.add(made)
    most[0] = max(most[0], len(alive))
    return made

  Watched.__hash__ = object.__hash__
  monkeypatch.setattr(tensor_file, "cast", watched)
  convert(tmp_path / "run", tmp_path / "to", "wan", say=quiet)
  assert 1 <= most[0] <= 3  # one for each worker, one that is handed over


def test_an_expert_gets_the_adapters_that_are_named_for_it(tmp_path):
  size = VARIANTS["wan22_i2v"]
  made = [model(size, seed=seed) for seed in (0, 1)]
  for folder, expert in zip(("transformer", "transformer_2"), made, strict=True):
    expert.save_pretrained(tmp_path / "pair" / folder)
  file = lora_file(tmp_path / "a=b" / "fast.safetensors", size, "comfyui")
  convert(tmp_path / "pair", tmp_path / "to", "diffusers", choice=Choice(loras=[f"low_noise={file}"]), say=quiet)
  assert same(state(tmp_path / "to" / "transformer"), dict(made[0].state_dict()))
  changed = state(tmp_path / "to" / "transformer_2")
  assert {name for name, x in made[1].state_dict().items() if not torch.equal(x, changed[name])} == {
    name for name in changed if ("ffn" in name or ".to_" in name) and "weight" in name}
  twice = Choice(loras=[f"low_noise={file}", f"low_noise={file}"], scale=0.5)
  convert(tmp_path / "pair", tmp_path / "twice", "diffusers", choice=twice, say=quiet)
  again = state(tmp_path / "twice" / "transformer_2")
  assert max(apart(again[name], x) for name, x in changed.items()) < 1e-6
  for given, source, words in [
    (str(file), "pair", "two experts: say for which --lora .*fast.safetensors is, high_noise=.* or low_noise="),
    (f"high_noise={file}", "pair/transformer", "holds one transformer and no high_noise: give --lora "),
    (str(tmp_path / "gone"), "pair/transformer", "gone")]:
    with pytest.raises(BadInput, match=words) as mistake:
      convert(tmp_path / source, tmp_path / "no", "wan", choice=Choice(loras=[given]), say=quiet)
    assert "\n" not in str(mistake.value)
  assert not (tmp_path / "no").exists()


def test_adapters_that_cannot_be_merged_are_refused_in_one_line(tmp_path):
  model(TEXT).save_pretrained(tmp_path / "base")
  strange = lora_file(tmp_path / "strange.safetensors", TEXT, "comfyui", loha_w1_a=torch.zeros(2))
  rooted = lora_file(tmp_path / "lora" / "adapter_model.safetensors", TEXT, "peft")
  (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"use_rslora": True, "lora_alpha": 4}))
  large = lora_file(tmp_path / "large.safetensors", TEXT, "comfyui", **{
    "diffusion_model.blocks.0.ffn.0.diff_b": torch.full((TEXT.mlp,), 7e4)})
  other = lora_file(tmp_path / "other.safetensors", replace(TEXT, width=256, heads=2), "kohya")
  for file, form, dtype, words in [
    (strange, "wan", "", "strange.safetensors: loha_w1_a is no adapter of this base"),
    (rooted, "wan", "", "trained with peft's use_rslora, which is not read here: merge it by peft"),
    (large, "wan", "float16", "beyond what float16 holds"), (large, "ours", "float16", "beyond what float16 holds"),
    (other, "wan", "", "do not fit a base of 128 inputs"),
    (other, "lora_peft", "", "is merged into weights and not into adapters")]:
    with pytest.raises(BadInput, match=words) as mistake:
      convert(tmp_path / "base", tmp_path / "no", form, dtype, choice=Choice(loras=[str(file)]), say=quiet)
    assert "\n" not in str(mistake.value)
  (tmp_path / "lora" / "adapter_config.json").write_text("{")
  with pytest.raises(BadInput, match="the settings of peft beside its tensors cannot be read"):
    convert(tmp_path / "base", tmp_path / "no", "wan", choice=Choice(loras=[str(tmp_path / "lora")]), say=quiet)
  assert not (tmp_path / "no").exists()


def test_dtypes_are_kept_or_changed_as_torch_changes_them(tmp_path):
  made = deepcopy(model(TEXT))
  made.save_pretrained(tmp_path / "source")
  for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
    convert(tmp_path / "source", tmp_path / name, "diffusers", name, say=quiet)
    narrow = {key: x.to(dtype) for key, x in made.state_dict().items()}
    assert same(state(tmp_path / name), narrow)
    convert(tmp_path / name, tmp_path / f"{name} ours", "ours", "float32", say=quiet)
    convert(tmp_path / f"{name} ours", tmp_path / f"{name} wide", "diffusers", say=quiet)
    assert same(state(tmp_path / f"{name} wide"), {key: x.float() for key, x in narrow.items()})
  with torch.no_grad():
    made.proj_out.bias[0] = 7e4
  made.save_pretrained(tmp_path / "large")
  with pytest.raises(BadInput, match="beyond what float16 holds"):
    convert(tmp_path / "large", tmp_path / "no", "wan", "float16", say=quiet)
  assert not (tmp_path / "no").exists()


def test_the_mixture_that_diffusers_writes_is_kept_and_others_are_refused(tmp_path):
  model(TEXT).save_pretrained(tmp_path / "source")
  mixed = WanTransformer3DModel.from_pretrained(tmp_path / "source", torch_dtype=torch.bfloat16)
  mixed.save_pretrained(tmp_path / "mixed")
  assert len({x.dtype for x in state(tmp_path / "mixed").values()}) == 2
  for number, form in enumerate(["wan", "ours", "comfyui", "diffusers"]):
    convert(tmp_path / str(number - 1) if number else tmp_path / "mixed", tmp_path / str(number), form, say=quiet)
  assert same(state(tmp_path / "3"), state(tmp_path / "mixed"))
  mixed.blocks[1].attn1.to_q.weight.data = mixed.blocks[1].attn1.to_q.weight.data.float()
  mixed.save_pretrained(tmp_path / "other")
  with pytest.raises(BadInput, match=r"mixes dtypes: .*bfloat16 and blocks.1.attn1.to_q.weight is float32 \(1 such"):
    convert(tmp_path / "other", tmp_path / "no", "wan", say=quiet)
  convert(tmp_path / "other", tmp_path / "one", "diffusers", "bfloat16", say=quiet)
  assert {x.dtype for x in state(tmp_path / "one").values()} == {torch.bfloat16}


def abstract(size: Size, dtype=jnp.float32):
  """Our parameters on eight devices."""
  made = mesh.build({"data": 2, "fsdp": 2, "tensor": 2})
  shapes = names.unflatten_dict({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in
                                 names.shapes(entries(size, "native")).items()}, sep="/")
  placed = placement.shardings(rules.RULES + rules.IMAGE_RULES * bool(size.image_width), shapes, made)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)


@pytest.mark.parametrize("form", ["source", "wan", "ours"])
def test_a_mesh_gets_every_array_in_its_place(form, published):
  _, size, made, root = published
  asked = abstract(size)
  got = sources.read(sources.source(root / form, size), asked)
  tensors = {name: x.float().numpy() for name, x in made.state_dict().items()}
  want = names.from_torch(tensors, entries(size, "diffusers"))
  for ours, theirs, place in zip(*map(jax.tree.leaves, (got, want, asked)), strict=True):
    assert ours.dtype == np.float32 and ours.sharding == place.sharding
    assert (np.asarray(ours) == theirs).all()
    assert all((np.asarray(shard.data) == theirs[shard.index]).all() for shard in ours.addressable_shards)


def test_a_mesh_refuses_weights_of_another_size_and_an_unnamed_expert(tmp_path):
  model(TEXT).save_pretrained(tmp_path / "pair" / "transformer")
  model(TEXT).save_pretrained(tmp_path / "pair" / "transformer_2")
  with pytest.raises(BadInput, match=r"holds a custom size.* and the model is wan21_i2v_14b: choose"):
    sources.source(tmp_path / "pair" / "transformer", SIZES["wan21_i2v_14b"])
  with pytest.raises(BadInput, match="two experts: say which, high_noise or low_noise"):
    sources.source(tmp_path / "pair", TEXT)


def test_a_part_of_an_array_costs_the_memory_of_the_part(tmp_path):
  """64 rows and columns out of a file with 16 GiB of holes."""
  side = 2**16
  place = tensor_file.create(tmp_path / "holes.safetensors", {"q.weight": (np.dtype(np.float32), (side, side))})
  entry, = names.entries([("q", "q", "scale", "d d")], 1, {"d": side}, layouts={
    "scale": (names.leaf("/kernel", ".weight", "i o -> o i"),)})
  box = range(100, 164), range(50_000, 50_064)
  with (tmp_path / "holes.safetensors").open("rb+") as file:
    file.seek(place["q.weight"].offset + 4 * (50_001 * side + 102))
    file.write(np.float32(7).tobytes())
  tracemalloc.start()
  part = weights._part(weights.find(tmp_path), [entry], box, np.float32)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert part[2, 1] == 7 and part.sum() == 7 and peak < 2**20


def ruin(path: Path, change) -> None:
  path.write_bytes(change(path.read_bytes()))


class Attack:
  def __reduce__(self):
    return os.system, ("touch attacked",)


def _index_change(folder: Path, change) -> None:
  path = next(folder.glob("*.index.json"))
  index = json.loads(path.read_text())
  change(index["weight_map"])
  path.write_text(json.dumps(index))


def cut_short(folder: Path) -> None:
  ruin(sorted(folder.glob("*.safetensors"))[1], lambda data: data[:-1])


def other_shape(folder: Path) -> None:
  tensors = {name: x.float() for name, x in model(TEXT).state_dict().items()}
  save_file(tensors | {"blocks.1.ffn.net.2.bias": torch.zeros(3)}, folder / "x.safetensors")


def leftover(folder: Path) -> None:
  save_file(dict(model(TEXT).state_dict()) | {"blocks.1.attn1.to_w.bias": torch.zeros(3)}, folder / "x.safetensors")


def gap(folder: Path) -> None:
  tensors = dict(model(TEXT).state_dict())
  del tensors["blocks.1.norm2.bias"]
  save_file(tensors, folder / "x.safetensors")


def code(folder: Path) -> None:
  (folder / "x.pth").write_bytes(pickle.dumps({"blocks.0.self_attn.q.weight": Attack()}))


BAD = {  # what is done to a whole folder, whether what is given is then the file x.*, words of the line
  "truncated shard": (cut_short, False, r"00002-of-.*.safetensors is not a whole safetensors file, it has .* bytes"),
  "shard gone": (lambda f: sorted(f.glob("*.safetensors"))[2].unlink(), False,
                 r"00003-of-.*.safetensors is missing, and .*index.json names it"),
  "missing index entry": (lambda f: _index_change(f, lambda m: m.pop("proj_out.bias")), False,
                          "has no entry for proj_out.bias, which is in diffusion_pytorch_model-"),
  "index entry of nothing": (lambda f: _index_change(f, lambda m: m.update(stray=m["proj_out.bias"])), False,
                             "says that stray is in diffusion_pytorch_model-.* where it is not"),
  "index out of the folder": (lambda f: _index_change(f, lambda m: m.update(stray="../x.safetensors")), False,
                              r"\.\./x.safetensors is missing"),
  "no index": (lambda f: next(f.glob("*.index.json")).unlink(), False, "safetensors files and no index"),
  "lost layers": (lambda f: ruin(f / "config.json", lambda d: d.replace(b'"num_layers": 2', b'"num_layers": 3')), False,
                  "tells of 3 layers and there are 2"),
  "heads that cannot be": (lambda f: ruin(f / "config.json", lambda d: d.replace(b'heads": 1', b'heads": 0')), False,
                           "num_attention_heads = 0"),
  "config of nothing": (lambda f: (f / "config.json").write_text("{"), False, "config.json cannot be read"),
  "wrong variant": (lambda f: save_file({"encoder.conv1.weight": torch.zeros(2)}, f / "x.safetensors"), True,
                    "not the weights of a Wan transformer or .*: their names are encoder.conv1.weight"),
  "leftover": (leftover, True, "no table row names: blocks.1.attn1.to_w.bias; .*blocks.1.attn1.to_v.bias"),
  "gap": (gap, True, "missing tensors: blocks.1.norm2.bias; the nearest name here is blocks.0.norm2.bias"),
  "other shape": (other_shape, True, r"blocks.1.ffn.net.2.bias has shape \(3,\)"),
  "code": (code, True, r"x.pth is not a pickle of tensors alone, whole and without code \(Weights only load failed"),
  "half a pickle": (lambda f: (f / "x.pth").write_bytes(pickle.dumps({})[:-1]), True, "not a pickle of tensors alone"),
  "no table": (lambda f: torch.save([torch.zeros(2)], f / "x.pth"), True, "not one table of named tensors"),
  "no header": (lambda f: (f / "x.safetensors").write_text("version https://git-lfs"), True,
                "do not begin with a header"),
  "no weights": (lambda f: [path.unlink() for path in f.glob("diff*")], False, "holds no weights"),
  "unknown format": (lambda f: (f / "x.gguf").write_text("GGUF"), True, "of an unknown format"),
  "one expert": (lambda f: (f / "transformer_2").mkdir(), False, "holds transformer_2 and no transformer"),
  "integers": (lambda f: save_file({k: x.to(torch.int8) for k, x in model(TEXT).state_dict().items()},
                                   f / "x.safetensors"), True,
               "is int8, and float32, bfloat16, float16 can be kept"),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bad") / "source"
  model(TEXT).save_pretrained(folder, max_shard_size="400KB")
  return folder


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_one_line_and_leaves_nothing(case, sharded, tmp_path, monkeypatch, capsys):
  change, one_file, words = BAD[case]
  monkeypatch.chdir(tmp_path)
  subprocess.run(["cp", "-r", sharded, "source"], check=True)
  change(Path("source"))
  given = next(Path("source").glob("x.*")) if one_file else Path("source")
  before = sorted(Path().rglob("*"))
  assert errors.run(lambda: convert(given, Path("to"), "wan", say=quiet)) == 2
  told = capsys.readouterr().err.splitlines()[-1]
  assert told.startswith("error: ")
  with pytest.raises(BadInput, match=words) as mistake:
    convert(given, Path("to"), "wan", say=quiet)
  assert "\n" not in str(mistake.value)
  assert sorted(Path().rglob("*")) == before


def test_a_full_folder_an_unknown_format_and_an_unknown_dtype_are_refused(sharded, tmp_path):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "film").touch()
  for to, form, dtype, words in [("full", "wan", "", "exists and is no empty folder"),
                                 ("no", "wann", "", "named 'wann'"),
                                 ("no", "wan", "bfloat61", "did you mean 'bfloat16'")]:
    with pytest.raises(BadInput, match=words):
      convert(sharded, tmp_path / to, form, dtype, say=quiet)
  assert sorted(path.name for path in tmp_path.rglob("*")) == ["film", "full"]


@pytest.mark.parametrize("form", ["wan", "comfyui", "ours"])
@pytest.mark.parametrize("blow", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
def test_what_stops_it_leaves_nothing(form, blow, sharded, tmp_path, monkeypatch):
  calls = iter(range(40))

  def failing(*arguments):
    if next(calls, None) is None:
      raise blow
    return arguments[0].view() if form == "ours" else fill(*arguments)

  fill = tensor_file.fill
  if form == "ours":
    monkeypatch.setattr(sources.leaves, "write", lambda folder, tree: (folder.mkdir(), (_ for _ in ()).throw(blow)))
  else:
    monkeypatch.setattr(tensor_file, "fill", failing)
  with pytest.raises(BadInput if isinstance(blow, OSError) else KeyboardInterrupt):
    convert(sharded, tmp_path / "to", form, say=quiet)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["wan", "ours"])
def test_a_bit_that_turns_on_the_way_to_the_disk_is_seen(form, sharded, tmp_path, monkeypatch):
  if form == "wan":
    def turned(place, pieces, fill=tensor_file.fill):
      crc = fill(place, pieces)
      if len(place.shape) == 3:
        ruin_at(place.path, place.offset)
      return crc
    monkeypatch.setattr(tensor_file, "fill", turned)
  else:
    write = sources.leaves.write
    monkeypatch.setattr(sources.leaves, "write",
                        lambda folder, tree: write(folder, jax.tree.map(lambda x: x + 1, tree)))
  with pytest.raises(BadInput, match="was not read back as it was written"):
    convert(sharded, tmp_path / "to", form, say=quiet)
  assert not list(tmp_path.iterdir())


def ruin_at(path: Path, at: int) -> None:
  with path.open("rb+") as file:
    file.seek(at)
    byte = file.read(1)
    file.seek(at)
    file.write(bytes([byte[0] ^ 1]))


def test_the_entry_point_converts_and_ends_as_it_should(sharded, tmp_path):
  """Well, with 0; on SIGTERM with 130, and nothing stays."""
  def run(*flags):
    return subprocess.Popen([sys.executable, "-m", "anisora_jax.convert", *flags], cwd=tmp_path, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])})

  file = str(lora_file(tmp_path / "style.safetensors", TEXT, "kohya"))
  good = run("--from", str(sharded), "--to", "out/wan", "--format", "wan", "--dtype", "bfloat16", "--lora", file,
             "--lora_scale", "0.5")
  os.mkfifo(tmp_path / "x.safetensors")
  stuck = run("--from", str(tmp_path / "x.safetensors"), "--to", "out/no", "--format", "wan")
  out, err = good.communicate()
  assert good.returncode == 0 and "custom size" in out and "bfloat16" in out and "CRC-32" in out
  assert "names of kohya, added 0.5 times" in out
  assert "100%" in err and len(state(tmp_path / "out/wan")) == len(model(TEXT).state_dict())
  with (tmp_path / "x.safetensors").open("wb"):  # opens when it is read, and then gives nothing
    stuck.send_signal(signal.SIGTERM)
    stuck.wait()
  out, err = stuck.communicate()
  assert stuck.returncode == 130 and err.splitlines()[-1] == "stopped: nothing was written to out/no"
  assert [path.name for path in (tmp_path / "out").iterdir()] == ["wan"] and not Path("attacked").exists()
