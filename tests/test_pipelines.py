"""Whole pipelines at tiny size: from the same noise, text and pictures our parts make the latents of diffusers' Wan."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_encoders
import test_vae
import test_wan
import torch
from compare import apart
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from transformers import BatchFeature

from anisora_jax.diffusion.times import schedule
from anisora_jax.models import names
from anisora_jax.models.wan import encoder_names, image
from anisora_jax.models.wan.dit import WanDiT
from anisora_jax.models.wan.sizes import Size
from anisora_jax.parallel import mesh
from anisora_jax.sampling import guidance, plans, sampler
from anisora_jax.sampling.solvers import unipc
from anisora_jax.tasks import conditions

STEPS, SHIFT, FRAMES = 8, 5.0, 9
CLIP = test_encoders.IMAGE
TEXT = Size(layers=2, width=48, heads=2, mlp=80, channels=6, text_width=20, text_tokens=11)
GIVEN = replace(TEXT, given=10)
SEEN = replace(GIVEN, image_width=CLIP.width, text_tokens=512)  # diffusers cuts image from text at 512
BOTH = replace(SEEN, image_positions=2 * CLIP.tokens)


@dataclass(frozen=True)
class Case:
  """A published kind of model and how it samples.

  pictures: pixel frames that are given. guidance: of each expert. multiplier: of frames that are given whole. boundary:
  of the experts. ends: of the schedule before its shift, by default those of diffusers.
  """

  size: Size
  pictures: tuple[int, ...] = ()
  guidance: tuple[float, ...] = (5.0,)
  boundary: float | None = None
  multiplier: float = 1.0
  codec: str = "wan21"
  ends: tuple[float, float] = (1.0, 0.001)


CASES = {
  "wan21 t2v": Case(TEXT),
  "wan21 t2v, unguided": Case(TEXT, guidance=(1.0,)),
  "wan21 i2v": Case(SEEN, (0,)),
  "wan21 i2v, unguided": Case(SEEN, (0,), (1.0,)),
  "wan21 i2v, in Wan's own steps": Case(SEEN, (0,), ends=(0.999, 0.0)),
  "wan21 flf2v": Case(BOTH, (0, FRAMES - 1)),
  "wan22 t2v a14b": Case(TEXT, guidance=(4.0, 3.0), boundary=0.875),
  "wan22 i2v a14b": Case(GIVEN, (0,), (3.5, 2.5), boundary=0.9),
  "wan22 i2v a14b, unguided": Case(GIVEN, (0,), (1.0, 1.0), boundary=0.9),
  "wan22 flf2v a14b": Case(GIVEN, (0, FRAMES - 1), (3.5, 2.5), boundary=0.9),
  "wan22 ti2v 5b, text": Case(TEXT, codec="wan22"),
  "wan22 ti2v 5b, picture": Case(TEXT, (0,), multiplier=0.0, codec="wan22"),
}


@dataclass(frozen=True)
class Inputs:
  """What both sides get. films: 0 .. 255, only given frames are read; text: the caption and the negative one."""

  films: np.ndarray
  noise: np.ndarray
  text: tuple[np.ndarray, np.ndarray]


def inputs_of(case: Case) -> Inputs:
  draw, p = np.random.default_rng(0), test_vae.SIZES[case.codec].spatial
  clip = (1, 1 + (FRAMES - 1) // 4, 4, 6)
  text = draw.normal(size=(2, 1, case.size.text_tokens, case.size.text_width)).astype(np.float32)
  return Inputs(draw.integers(0, 256, (1, FRAMES, 4 * p, 6 * p, 3), dtype=np.uint8),
                draw.normal(size=(*clip, case.size.channels)).astype(np.float32), (text[0], text[1]))


def experts_of(case: Case) -> list[WanTransformer3DModel]:
  """One random network a guidance scale, the second with the numbers of the first in reverse."""
  models = [test_wan.randomised(case.size).eval() for _ in case.guidance]
  with torch.no_grad():
    for p in (p for model in models[1:] for p in model.parameters()):
      p.copy_(p.flip(0, 1) if p.ndim > 1 else p.flip(0))
  return models


def codec_of(case: Case) -> tuple:
  """(theirs, ours)."""
  models = {case.codec: test_vae.randomised(test_vae.SIZES[case.codec]).eval()}
  return models[case.codec], test_vae.ours(models, case.codec)


@pytest.fixture(scope="module")
def eye() -> tuple:
  """The image encoder: (theirs, our parameters)."""
  model = test_encoders.randomised(test_encoders.image_witness(CLIP))
  return model, names.from_torch(test_encoders.arrays(model), encoder_names.image_entries(CLIP, "huggingface"))


def prepare(images, return_tensors: str) -> BatchFeature:
  """In the place of diffusers' image processor, which crops: pictures as Wan's own code prepares them."""
  pictures = np.stack([np.asarray(picture) for picture in (images if isinstance(images, list) else [images])])
  square = test_encoders.upstream_prepares(pictures / 127.5 - 1, side=CLIP.side)
  return BatchFeature({"pixel_values": torch.from_numpy(square).float().permute(0, 3, 1, 2)})


def diffusers_makes(case: Case, inputs: Inputs, codec, experts: list, eye) -> np.ndarray:
  scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
  if case.ends != Case.ends:
    steps = partial(scheduler.set_timesteps, sigmas=np.linspace(*case.ends, STEPS + 1)[:-1])
    scheduler.set_timesteps = lambda count, device: steps(device=device)
  parts = {"tokenizer": None, "text_encoder": None, "vae": codec, "scheduler": scheduler, "transformer": experts[0],
           "transformer_2": experts[1] if case.boundary else None, "boundary_ratio": case.boundary,
           "expand_timesteps": case.codec == "wan22"}
  caption, negative = map(torch.from_numpy, inputs.text)
  call = {"prompt_embeds": caption, "negative_prompt_embeds": negative, "latents": test_vae.first(inputs.noise),
          "height": inputs.films.shape[2], "width": inputs.films.shape[3], "num_frames": FRAMES,
          "num_inference_steps": STEPS, "guidance_scale": case.guidance[0], "output_type": "latent",
          "guidance_scale_2": case.guidance[1] if case.boundary else None}
  if case.pictures:
    pipe = WanImageToVideoPipeline(**parts, image_encoder=eye)
    pipe.image_processor = prepare
    pictures = [Image.fromarray(inputs.films[0, frame]) for frame in case.pictures]
    call |= dict(zip(("image", "last_image"), pictures, strict=False))
  else:
    pipe = WanPipeline(**parts)
  pipe.set_progress_bar_config(disable=True)
  return test_vae.last(pipe(**call).frames)


@partial(jax.jit, static_argnums=(0, 1))
def walk(size: Size, scale: float, params, rows, x, memory, shown):
  """One expert's rows. shown: what is given, image tokens, the two texts."""
  channels, tokens, (caption, negative) = shown

  def network(text, x, told):
    return WanDiT(size, mesh.build()).apply({"params": params}, x, told, text, channels, tokens)

  guided = guidance.text(partial(network, caption), partial(network, negative), scale)
  return sampler.walk(guided, rows, x, memory, unipc)


def ours_make(case: Case, inputs: Inputs, codec, experts: list, eye) -> np.ndarray:
  frames, p = jnp.asarray(inputs.films / 127.5 - 1, jnp.float32), codec.spatial
  mask = jnp.zeros((1, FRAMES, frames.shape[2] // p, frames.shape[3] // p), bool).at[:, list(case.pictures)].set(True)
  given = conditions.condition(frames, mask, partial(test_vae.encode, codec), codec.temporal)
  tokens = None
  if case.size.image_width:
    pictures = conditions.pictures(frames, mask, len(case.pictures))
    tokens = image.encode(image.CLIPVision(CLIP, mesh.build()), eye, pictures[0]).reshape(1, -1, CLIP.width)
  multiplier = np.where(np.asarray(given.frozen).all(0), case.multiplier, 1).astype(np.float32)
  plan = plans.sync(schedule(STEPS, SHIFT, *case.ends), multiplier, whole=True)
  x = sampler.begin(plan, jnp.asarray(inputs.noise), given.known)
  memory = unipc.start(x)
  for expert, piece in sampler.pieces(plan, case.boundary):
    x, memory = walk(case.size, case.guidance[expert], experts[expert], sampler.rows(plan, piece), x, memory,
                     (given.channels() if case.size.given else None, tokens, inputs.text))
  return x


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_latents_are_those_of_the_pipelines_of_diffusers(case, eye):
  inputs, networks, (their_codec, our_codec) = inputs_of(case), experts_of(case), codec_of(case)
  theirs = diffusers_makes(case, inputs, their_codec, networks, eye[0])
  params = [test_wan.params_of(network, case.size) for network in networks]
  ours = ours_make(case, inputs, our_codec, params, eye[1])
  # Nine or more networks in a row, each off by some f32 roundings, which guidance multiplies.
  assert apart(ours, theirs) < 3e-5
