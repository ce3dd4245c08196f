"""Every recipe becomes parts, at full size and without memory, and samples by the published schedule."""

import importlib
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from anisora_jax.diffusion.times import schedule
from anisora_jax.experiment import encode, parts, train
from anisora_jax.models.wan.sizes import SIZES
from anisora_jax.sampling import plans, sampler
from anisora_jax.sampling.solvers import SOLVERS

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {  # config, word -> trained parameters of a network of this size
  ("wan21_t2v_1p3b", "full"): "wan21_t2v_1p3b",
  ("wan21_i2v_14b", "full"): "wan21_i2v_14b",
  ("wan21_i2v_14b", "lora"): "wan21_i2v_14b",
  ("anisora_v3", "lora"): "wan21_i2v_14b",
  ("wan22_i2v_a14b", "high"): "wan22_i2v_a14b",
  ("wan22_i2v_a14b", "low_lora"): "wan22_i2v_a14b",
  ("anisora_v32", "high_lora"): "wan22_i2v_a14b",
  ("wan22_ti2v_5b", "full"): "wan22_ti2v_5b",
  ("pusa", "lora"): "wan21_t2v_14b",
}


def read(name: str, mode: str = ""):
  config = importlib.import_module(f"configs.{name}").get_config(*[mode] * bool(mode))
  config.model.kernel = "dense"  # cudnn needs a GPU
  config.model.weights = "somewhere"
  return config


def test_every_recipe_for_published_weights_is_below():
  others = {"base", "wan", "tiny", "toons", "curation"}
  found = {path.stem for path in (ROOT / "configs").glob("*.py")} - others
  assert found == {name for name, _ in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=" ".join)
def test_a_recipe_becomes_parts_of_the_published_size(recipe):
  config = read(*recipe)
  made = parts.assemble(config)
  base = jax.tree.leaves(parts.abstract_params(made, kept=True))
  assert sum(leaf.size for leaf in base) == SIZES[RECIPES[recipe]].parameters()
  trained = sum(leaf.size for leaf in jax.tree.leaves(parts.abstract_trained(made)))
  assert 1e8 < trained < 3e9 if "lora" in recipe[1] else trained == SIZES[RECIPES[recipe]].parameters()
  batch = train.abstract_batch(made, made.buckets[0])
  assert batch["latents"].shape == (8, *made.latent_shape(made.buckets[0]), made.size.channels)
  assert ("image" in batch) == bool(made.size.image_width)
  assert encode.learned(config)["tasks"] == config.tasks.to_dict()
  memory = sum(leaf.dtype.itemsize * leaf.size for leaf in base)
  assert memory < 2.2 * SIZES[RECIPES[recipe]].parameters()  # a base that is kept is nearly all bfloat16


def told(config) -> plans.Plan:
  settings = config.sample
  sigmas = np.asarray(schedule(settings.steps, settings.shift, settings.start, settings.end))
  return plans.sync(sigmas, np.ones(2, np.float32), settings.whole)


@pytest.mark.parametrize("name", ["anisora_v3", "anisora_v32"])
def test_anisora_samples_at_its_eight_timesteps_without_a_second_pass(name):
  config = read(name)
  assert np.round(1000 * told(config).told[:, 0]).tolist() == [999, 972, 937, 892, 833, 749, 624, 416]
  assert config.sample.guidance == 1 and SOLVERS[config.sample.solver] is SOLVERS["unipc"]
  assert config.sample.guidance_low < 0  # as the first expert
  assert config.tasks == read("anisora_v3").tasks and config.loss == read("anisora_v3").loss


def test_the_experts_of_anisora_share_its_eight_steps_three_to_five():
  pieces = sampler.pieces(told(read("anisora_v32")), read("anisora_v32").sample.boundary)
  assert [(expert, len(range(8)[rows])) for expert, rows in pieces] == [(0, 3), (1, 5)]


@pytest.mark.parametrize("name, steps, shift", [("wan21_i2v_14b", 40, 3.0), ("wan22_i2v_a14b", 40, 5.0),
                                                ("anisora_v3", 8, 5.0), ("anisora_v32", 8, 5.0)])
def test_image_to_video_samples_by_the_published_steps_and_shift(name, steps, shift):
  """From: generate.py of Wan2.1 and Wan2.2, at 832 x 480; AniSora's README."""
  settings = read(name).sample
  assert (settings.steps, settings.shift) == (steps, shift)


def test_text_to_video_takes_fifty_steps_as_published():
  assert read("wan21_t2v_1p3b").sample.steps == read("wan22_ti2v_5b").sample.steps == 50


def test_the_experts_share_forty_steps_as_published():
  config = read("wan22_i2v_a14b", "high")
  assert [(expert, len(range(40)[rows])) for expert, rows in sampler.pieces(told(config), config.sample.boundary)
          ] == [(0, 15), (1, 25)]
  high, low = read("wan22_i2v_a14b", "high"), read("wan22_i2v_a14b", "low")
  assert (high.times.low, high.times.high, low.times.low, low.times.high) == (0.9, 1, 0, 0.9)


@pytest.mark.parametrize("word", ["wan21_i2v_14b.py:loara", "wan22_i2v_a14b.py:lora", "tiny.py:lora"])
def test_a_wrong_word_after_a_config_is_one_line(word):
  done = subprocess.run([sys.executable, "-m", "anisora_jax.train", f"--config=configs/{word}", "--dry_run"], cwd=ROOT,
                        capture_output=True, text=True, timeout=120)
  lines = done.stderr.splitlines()
  assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in done.stderr
