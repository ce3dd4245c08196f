"""The Wan codecs equal diffusers', whole, in chunks and in tiles; their names and shapes are the published ones."""

import math
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compare import apart
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from einops import repeat
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from anisora_jax.errors import BadInput
from anisora_jax.models import names, tiles
from anisora_jax.models.codec import Codec, latent_shape
from anisora_jax.models.pixels import Pixels
from anisora_jax.models.wan import vae, vae_names
from anisora_jax.models.wan.vae import WanVAE
from anisora_jax.models.wan.vae_sizes import VAE_SIZES, VAESize
from anisora_jax.parallel import mesh

DRAW = np.random.default_rng(0)
WAN21 = VAESize(encoder=4, decoder=4, blocks=1, means=tuple(DRAW.normal(size=6)),
                deviations=tuple(DRAW.uniform(1, 3, size=6)))
SIZES = {"wan21": WAN21, "wan22": replace(WAN21, decoder=8, shortcuts=True, patch=2)}
CASES = [("wan21", (2, 9, 16, 24)), ("wan21", (1, 1, 24, 8)), ("wan22", (2, 9, 32, 48)), ("wan22", (1, 1, 48, 16))]
# Tens of layers, each of which adds tens of terms in another order.
CLOSE = 1e-5


def witness(size: VAESize) -> AutoencoderKLWan:
  return AutoencoderKLWan(
    base_dim=size.encoder, decoder_base_dim=size.decoder, z_dim=size.channels, dim_mult=list(size.widths),
    num_res_blocks=size.blocks, temperal_downsample=list(size.time_steps), is_residual=size.shortcuts,
    in_channels=size.pixel, out_channels=size.pixel, patch_size=size.patch if size.patch > 1 else None,
    scale_factor_spatial=size.spatial, scale_factor_temporal=size.temporal, latents_mean=list(size.means),
    latents_std=list(size.deviations))


def randomised(size: VAESize) -> AutoencoderKLWan:
  """A witness in which no parameter has kept its start: no zeros, no ones."""
  model, draw = witness(size), torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      p.copy_(torch.randn(p.shape, generator=draw) * (p[0].numel() ** -0.5 if "weight" in name else 0.3))
      if "gamma" in name:
        p.add_(1)
  return model


@pytest.fixture(scope="module")
def models() -> dict[str, AutoencoderKLWan]:
  return {name: randomised(size) for name, size in SIZES.items()}


def ours(models: dict, name: str, **options) -> WanVAE:
  tensors = {key: p.detach().numpy() for key, p in models[name].named_parameters()}
  return WanVAE(names.from_torch(tensors, vae_names.entries(SIZES[name], "diffusers")), SIZES[name], **options)


encode = jax.jit(lambda codec, frames, *key: codec.encode(frames, *key))
decode = jax.jit(lambda codec, latents: codec.decode(latents))


def frames_of(clip: tuple) -> np.ndarray:
  return np.random.default_rng(1).uniform(-1, 1, (*clip, 3)).astype(np.float32)


def first(x: np.ndarray) -> torch.Tensor:
  """Channels first, as the witness has them."""
  return torch.from_numpy(np.moveaxis(x, -1, 1))


def last(x: torch.Tensor) -> np.ndarray:
  return np.moveaxis(x.detach().numpy(), 1, -1)


def normalised(mean: torch.Tensor, size: VAESize) -> np.ndarray:
  return (last(mean) - np.float32(size.means)) / np.float32(size.deviations)


@torch.no_grad()
def theirs(model: AutoencoderKLWan, size: VAESize, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(normalised latents, deviations of the posterior, frames decoded from those latents) by the witness."""
  posterior = model.encode(first(frames)).latent_dist
  return normalised(posterior.mean, size), last(posterior.std), last(model.decode(posterior.mean).sample)


@pytest.mark.parametrize(("name", "clip"), CASES)
def test_latents_and_frames_equal_the_witness(models, name, clip):
  codec, frames = ours(models, name), frames_of(clip)
  latents, _, made = theirs(models[name], SIZES[name], frames)
  assert (np.abs(made) == 1).mean() < 0.2  # what is clamped would judge nothing
  assert apart(encode(codec, frames), latents) < CLOSE
  assert apart(decode(codec, latents), made) < CLOSE


@pytest.mark.parametrize(("name", "clip"), CASES)
def test_chunks_make_what_a_whole_clip_makes(models, name, clip):
  whole, chunks, frames = ours(models, name), ours(models, name, chunked=True), frames_of(clip)
  latents = encode(whole, frames)
  assert apart(encode(chunks, frames), latents) < CLOSE
  assert apart(decode(chunks, latents), decode(whole, latents)) < CLOSE


def test_a_sample_spreads_about_the_mean_as_the_posterior_says(models):
  name, clip = CASES[1]
  codec, frames, key = ours(models, name), frames_of(clip), jax.random.key(3)
  mean, spread, _ = theirs(models[name], SIZES[name], frames)
  drawn = spread * np.asarray(jax.random.normal(key, mean.shape)) / np.float32(SIZES[name].deviations)
  assert apart(encode(codec, frames, key), mean + drawn) < CLOSE


def test_bf16_arithmetic_stays_near_f32(models):
  name, clip = CASES[1]
  frames, (exact, rough) = frames_of(clip), (ours(models, name), ours(models, name, dtype=jnp.bfloat16))
  latents = encode(exact, frames)
  # 8 bits of mantissa through about thirty layers.
  assert 1e-4 < apart(encode(rough, frames), latents) < 0.05
  assert 1e-4 < apart(decode(rough, latents), decode(exact, latents)) < 0.05


def test_tiles_equal_those_of_the_witness(models):
  """Where it has tiles of full size: it cuts the last one off at the edge, we move it back."""
  name, model = "wan21", models["wan21"]
  codec, frames = ours(models, name, tile=32, overlap=8), frames_of((1, 1, 56, 24))
  model.enable_tiling(32, 32, 24, 24)
  latents, _, made = theirs(model, SIZES[name], frames)
  model.use_tiling = False
  assert apart(encode(codec, frames)[:, :, :6], latents[:, :, :6]) < CLOSE
  assert apart(decode(codec, latents)[:, :, :48], made[:, :, :48]) < CLOSE


@pytest.mark.parametrize(("tile", "overlap"), [(4, 2), (4, 1), (5, 0), (30, 7)])
def test_tiles_of_what_changes_nothing_change_nothing(tile, overlap):
  x = jax.random.normal(jax.random.key(0), (2, 1, 9, 14, 3))
  np.testing.assert_allclose(tiles.blend(lambda x: x, x, tile, overlap, (1, 1)), x, rtol=1e-6)
  doubled = repeat(x, "b f h w c -> b f (h 2) (w 2) c")
  grown = tiles.blend(lambda x: repeat(x, "b f h w c -> b f (h 2) (w 2) c"), x, tile, overlap, (1, 2))
  np.testing.assert_allclose(grown, doubled, rtol=1e-6)
  np.testing.assert_allclose(tiles.blend(lambda x: x[:, :, ::2, ::2], doubled, tile, overlap, (2, 1)), x, rtol=1e-6)


def test_a_tile_as_large_as_the_clip_is_the_whole_clip(models):
  name, clip = CASES[0]
  frames = frames_of(clip)
  np.testing.assert_array_equal(encode(ours(models, name, tile=32, overlap=16), frames),
                                encode(ours(models, name), frames))


@pytest.mark.parametrize("chunked", [False, True])
def test_devices_share_a_batch_without_talking(models, chunked):
  codec, on = ours(models, "wan21", chunked=chunked), mesh.build({"data": 4, "fsdp": 2})
  frames = frames_of((8, 5, 8, 16))
  for work, given in [(encode, frames), (decode, encode(codec, frames))]:
    spread = jax.device_put(given, NamedSharding(on, P(mesh.BATCH)))
    program = work.lower(codec, spread).compile()
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", program.as_text())
    assert work(codec, spread).sharding.is_equivalent_to(spread.sharding, 5)
    assert apart(work(codec, spread), work(codec, given)) < CLOSE


def memory(size: VAESize, clip: tuple[int, int, int], **options) -> list[float]:
  """GiB at work to encode and to decode one clip, of the compiled programs."""
  paths = names.shapes(vae_names.entries(size, "native"))
  params = unflatten_dict({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in paths.items()}, sep="/")
  codec = WanVAE(params, size, **options)
  frames = jax.ShapeDtypeStruct((1, *clip, 3), jnp.float32)
  latents = jax.ShapeDtypeStruct((1, *latent_shape(codec, *clip), codec.channels), jnp.float32)
  return [work.lower(codec, x).compile().memory_analysis().temp_size_in_bytes / 2**30
          for work, x in [(encode, frames), (decode, latents)]]


def test_chunks_take_no_more_memory_for_longer_clips_but_that_of_the_clip():
  size, more = replace(WAN21, encoder=32, decoder=32), 72 * 32 * 32 * 3 * 4 / 2**30
  short, long = (memory(size, (f, 32, 32), chunked=True) for f in (9, 81))
  assert all(b - a < 3 * more for a, b in zip(short, long, strict=True)), (short, long, more)


def test_chunks_in_tiles_bound_the_memory_of_81_frames_of_720p():
  bounded = dict(chunked=True, tile=256, overlap=64)
  for name, height in [("wan21", 720), ("wan22", 704)]:
    assert max(memory(VAE_SIZES[name], (81, height, 1280), **bounded)) < 3, name  # GiB; else some hundred


def test_jitted_functions_take_the_parameters_as_arguments(models):
  codec, frames = ours(models, "wan21"), frames_of((1, 1, 8, 8))
  assert isinstance(codec, Codec)
  assert len(jax.tree.leaves(codec)) == len(list(models["wan21"].parameters()))
  held = jax.make_jaxpr(lambda codec, x: codec.decode(codec.encode(x)))(codec, frames).consts
  assert sum(np.size(x) for x in held) <= 4 * codec.channels  # means and deviations, there and back
  assert jax.tree.leaves(Pixels()) == [] and encode(Pixels(8), frames).shape == (1, 1, 1, 1, 192)


@pytest.mark.parametrize(("work", "line"), [
  (lambda codec: codec.encode(jnp.zeros((1, 4, 8, 8, 3))),
   "4 frames do not fit a codec of temporal stride 4: take 1 + 4k, for example 1."),
  (lambda codec: codec.encode(jnp.zeros((1, 5, 8, 12, 3))),
   "8x12 pixels do not fit a codec of spatial stride 8: take multiples of 8, for example 8x8."),
  (lambda codec: codec.replace(tile=36, overlap=8),
   "tiles of 36 pixels with an overlap of 8 do not fit this codec: take multiples of 8, an overlap of half a tile at "
   "most, for example 256 and 64."),
  (lambda codec: codec.replace(tile=32, overlap=24), "tiles of 32 pixels with an overlap of 24 do not fit"),
  (lambda codec: codec.replace(overlap=8), "tiles of 0 pixels with an overlap of 8 do not fit"),
  (lambda codec: replace(codec.size, means=(0.0,)), "1 means for 6 deviations: give one of each for a channel."),
  (lambda codec: replace(codec.size, widths=(1, 2)), "2 levels have 1 steps, got 3: "),
])
def test_what_does_not_fit_is_told_in_one_line(models, work, line):
  with pytest.raises(BadInput, match=f"^{re.escape(line)}") as told:
    work(ours(models, "wan21"))
  assert "\n" not in str(told.value)


PUBLISHED = {"wan21": (126_892_531, 194), "wan22": (704_688_668, 196)}  # parameters, tensors


@pytest.mark.parametrize("name", VAE_SIZES)
def test_names_and_shapes_are_those_of_the_published_codecs(name):
  size = VAE_SIZES[name]
  with torch.device("meta"):
    model = witness(size)
  wanted = names.table(vae_names.entries(size, "diffusers"))
  assert wanted == {key: tuple(p.shape) for key, p in model.state_dict().items()}
  assert (sum(map(math.prod, wanted.values())), len(wanted)) == PUBLISHED[name]
  made = jax.eval_shape(partial(vae.init, size=size), jax.random.key(0))
  names.check_ours({"/".join(key.key for key in path): leaf.shape
                    for path, leaf in jax.tree_util.tree_leaves_with_path(made)}, vae_names.entries(size, "native"))


def test_the_published_strides_and_defaults_are_ours():
  wan21, wan22 = (VAE_SIZES[name] for name in ("wan21", "wan22"))
  assert (wan21.temporal, wan21.spatial, wan21.channels) == (4, 8, 16)
  assert (wan22.temporal, wan22.spatial, wan22.channels) == (4, 16, 48)
  with torch.device("meta"):
    told = AutoencoderKLWan().config
  assert (told.latents_mean, told.latents_std) == (list(wan21.means), list(wan21.deviations))


def test_native_names_become_diffusers_names_by_diffusers_own_conversion():
  native, diffusers = ([entry.name for entry in vae_names.entries(VAE_SIZES["wan21"], naming)]
                       for naming in ("native", "diffusers"))
  assert convert_wan_vae_to_diffusers({name: name for name in native}) == dict(zip(diffusers, native, strict=True))


# What diffusers' scripts/convert_wan_to_diffusers.py renames in the codec of Wan 2.2, in its order.
WAN22_RULES = [
  (r"^conv1", "quant_conv"), (r"^conv2", "post_quant_conv"), (r"coder\.conv1", "coder.conv_in"),
  (r"head\.0", "norm_out"), (r"head\.2", "conv_out"), (r"middle\.0", "mid_block.resnets.0"),
  (r"middle\.1", "mid_block.attentions.0"), (r"middle\.2", "mid_block.resnets.1"),
  (r"coder\.downsamples", "coder.down_blocks"), (r"coder\.upsamples", "coder.up_blocks"),
  (r"\.(?:down|up)samples(\.\d\.(?:residual|shortcut))", r".resnets\1"),
  (r"\.(down|up)samples\.\d\.(resample|time_conv)", r".\1sampler.\2"),
  (r"residual\.0", "norm1"), (r"residual\.2", "conv1"), (r"residual\.3", "norm2"), (r"residual\.6", "conv2"),
  (r"\.shortcut", ".conv_shortcut"),
]


def test_native_names_of_wan22_become_diffusers_names_by_its_published_rules():
  native, diffusers = (vae_names.entries(VAE_SIZES["wan22"], naming) for naming in ("native", "diffusers"))
  for here, there in zip(native, diffusers, strict=True):
    name = here.name
    for pattern, instead in WAN22_RULES:
      name = re.sub(pattern, instead, name)
    assert name == there.name
  assert "encoder.downsamples.1.downsamples.2.time_conv.weight" in {entry.name for entry in native}


@pytest.mark.parametrize("naming", vae_names.NAMINGS)
@pytest.mark.parametrize("name", SIZES)
def test_names_there_and_back_change_no_bit(models, name, naming):
  params, entries = ours(models, name).params, vae_names.entries(SIZES[name], naming)
  back = names.from_torch(names.to_torch(params, entries), entries)
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all() and a.dtype == b.dtype, params, back))
