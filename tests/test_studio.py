"""Films from published files: as diffusers' pipeline makes them, with one expert at a time on the devices."""

import importlib
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import test_encoders
import test_vae
from absl import flags
from absl.testing import flagsaver
from compare import apart
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline
from drawn import packed
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from anisora_jax.errors import BadInput
from anisora_jax.experiment import origin, sample, studio, train
from anisora_jax.loaders import buckets
from anisora_jax.sampling import given
from anisora_jax.sampling.request import Request, lay_out
from configs import tiny

ROOT = Path(__file__).resolve().parents[1]
FRAMES, HEIGHT, WIDTH = 9, 32, 48
tokens = test_encoders.folder  # a fixture: the tokenizer


@pytest.fixture(scope="module", autouse=True)
def _tables():
  with published.entered(tiny_wan=published.SIZE, tiny_wan_t2v=replace(published.SIZE, given=0)):
    yield


@pytest.fixture(scope="module")
def download(tmp_path_factory, tokens):
  folder = tmp_path_factory.mktemp("Wan-tiny")
  return folder, published.write(folder, published.SIZE, tokens, experts=2)


@pytest.fixture(scope="module")
def still(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("stills") / "a.png"
  pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
  Image.fromarray(pixels).save(path)
  return path


SETTINGS = {"sample__solver": "unipc", "sample__steps": 8, "sample__shift": 5.0, "sample__end": 0.001,
            "sample__whole": True, "sample__multiplier": 1.0, "sample__boundary": 0.9, "sample__guidance": 3.5,
            "sample__guidance_low": 2.5, "sample__negative": "the old cat"}


def opened(download, changes=(), count=1, adapters="", **settings) -> studio.Studio:
  made = published.config("tiny_wan", Path(), download[0], **{**SETTINGS, **settings})
  return studio.open_weights(made, dict(changes), adapters, count)


@pytest.fixture(scope="module")
def made(download) -> studio.Studio:
  return opened(download)


def test_a_film_from_published_files_is_that_of_diffusers_pipeline(made, download, still):
  folder, models = download
  request = Request(FRAMES, HEIGHT, WIDTH, 16.0, first=str(still))
  canvas, mask = lay_out(request, made.parts.codec.spatial)
  noise = np.random.default_rng(1).normal(size=(1, 3, HEIGHT // 8, WIDTH // 8, 6)).astype(np.float32)
  pipe = WanImageToVideoPipeline(
    tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"), text_encoder=models["text_encoder"],
    vae=models["vae"], transformer=models["transformer"], transformer_2=models["transformer_2"], boundary_ratio=0.9,
    scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0))
  pipe.set_progress_bar_config(disable=True)
  call = {"image": Image.open(still), "prompt": "a cat follows the moon", "negative_prompt": "the old cat",
          "height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "num_inference_steps": 8, "guidance_scale": 3.5,
          "guidance_scale_2": 2.5, "max_sequence_length": published.SIZE.text_tokens,
          "latents": test_vae.first(noise)}
  theirs = test_vae.last(pipe(**call, output_type="latent").frames)
  ours = made.latents(canvas[None], mask[None], ["a cat follows the moon"], jnp.asarray(noise))
  assert apart(ours, theirs) < 3e-5
  films = np.asarray(made._decode(made.codec, ours))[0].astype(int)
  assert np.abs(films - 255 * pipe(**call, output_type="np").frames[0]).max() < 1


def test_a_film_whose_frames_are_split_is_that_of_one_device(download):
  """The first and last of three latent frames do not see each other."""
  near = dict(model__mask="window:1", model__attention="local_global", sample__steps=2)
  hidden = np.zeros((1, FRAMES, HEIGHT, WIDTH, 3), np.uint8), np.zeros((1, FRAMES, HEIGHT // 8, WIDTH // 8), bool)
  noise = np.random.default_rng(1)
  noise = jnp.asarray(noise.normal(size=(1, 3, HEIGHT // 8, WIDTH // 8, 6)), jnp.float32)
  made = {}
  for count in (1, 2):
    there = opened(download, count=count, **near)
    assert there.parts.mesh.shape["clip"] == count
    made[count] = np.asarray(there.latents(*hidden, ["a cat"], noise))
  assert apart(made[2], made[1]) < 1e-5
  assert apart(made[1], opened(download, sample__steps=2).latents(*hidden, ["a cat"], noise)) > 1e-3


def test_one_expert_at_a_time_is_on_the_devices_and_comes_back_as_it_was(made, download):
  high = jax.tree.map(np.asarray, made.rack.get(0))
  on_device = jax.tree.leaves(made.rack.get(0))
  low = jax.tree.map(np.asarray, made.rack.get(1))
  assert all(leaf.is_deleted() for leaf in on_device)
  assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(made.rack.parked[0])} == {"pinned_host"}
  jax.tree.map(np.testing.assert_array_equal, high, made.rack.get(0))
  for model, params in ((download[1]["transformer"], high), (download[1]["transformer_2"], low)):
    weight = model.state_dict()["blocks.1.ffn.net.0.proj.weight"].numpy()
    np.testing.assert_array_equal(params["blocks"]["mlp"]["up"]["kernel"][1], weight.T)


def test_the_text_encoder_leaves_once_all_captions_are_known(download, still, tmp_path):
  made = opened(download, sample__steps=1)
  request = Request(5, HEIGHT, WIDTH, 16.0, first=str(still))
  orders = [sample.Order(request, f"cat {number}", tmp_path / f"v3.{number}", 0) for number in range(2)]
  sample.make(made, orders)
  assert set(made.told) == {"cat 0", "cat 1", "the old cat"} and "captions" not in made.__dict__
  files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}  # a dot of a name ends no name
  assert set(files) == {f"v3.{number}{ending}" for number in range(2) for ending in sample.ENDINGS}
  assert min(files.values()) > 200


@pytest.mark.parametrize("word, out", [("film", "film"), ("out/v3.1", "out/v3.1"), ("film.mp4", "film"),
                                       ("a/b.c.png", "a/b.c"), ("v.gif/", "v")])
def test_a_name_keeps_its_dots_and_loses_one_ending(word, out):
  assert sample.out_of(word) == Path(out)


@pytest.mark.parametrize("word", ["", ".", "..", "out/..", ".mp4", "/"])
def test_a_name_of_nothing_is_refused(word):
  with pytest.raises(BadInput, match="names no film: give a name such as out/film"):
    sample.out_of(word)


def test_kept_kernels_are_of_the_arithmetic_s_dtype_and_all_else_float32(download):
  params = opened(download, model__dtype="bfloat16", sample__steps=1).rack.get(0)
  dtypes = {jax.tree_util.keystr(path, simple=True, separator="/"): str(leaf.dtype)
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  assert {dtype for path, dtype in dtypes.items() if path.startswith("blocks/") and path.endswith("kernel")
          } == {"bfloat16"}
  assert {dtype for path, dtype in dtypes.items() if not (path.startswith("blocks/") and path.endswith("kernel"))
          } == {"float32"}


def adapter(path: Path, download) -> Path:
  """A file of adapters in diffusers' names, of two layers and a bias, with random numbers."""
  draw, state = np.random.default_rng(3), download[1]["transformer"].state_dict()
  tensors = {}
  for name in ("blocks.0.attn1.to_q", "blocks.1.attn1.to_q", "blocks.1.ffn.net.2"):
    o, i = state[f"{name}.weight"].shape
    tensors |= {f"transformer.{name}.lora_A.weight": draw.normal(size=(3, i)).astype(np.float32),
                f"transformer.{name}.lora_B.weight": draw.normal(size=(o, 3)).astype(np.float32) / 10}
  tensors["transformer.blocks.0.attn1.to_q.diff_b"] = draw.normal(size=48).astype(np.float32)
  tensors["transformer.blocks.1.ffn.net.2.diff"] = draw.normal(size=(48, 80)).astype(np.float32)
  save_file(tensors, path)
  return path


@pytest.mark.parametrize("count", [1, 8])
def test_adapters_of_a_file_are_added_to_the_expert_they_are_for(download, tmp_path, count):
  file = adapter(tmp_path / "style.safetensors", download)
  tensors = load_file(file)
  made = opened(download, count=count, adapters=f"low_noise:{file}=0.5")
  for number, name in enumerate(("transformer", "transformer_2")):
    params, state = jax.tree.map(np.asarray, made.rack.get(number)), download[1][name].state_dict()
    for ours, layer, theirs in (("self_attention/q", 0, "blocks.0.attn1.to_q"), ("mlp/down", 1, "blocks.1.ffn.net.2"),
                                ("mlp/down", 0, "blocks.0.ffn.net.2")):
      wanted = state[f"{theirs}.weight"].numpy()
      if number == 1 and f"transformer.{theirs}.lora_A.weight" in tensors:
        wanted = wanted + 0.5 * (tensors[f"transformer.{theirs}.lora_B.weight"]
                                 @ tensors[f"transformer.{theirs}.lora_A.weight"]
                                 + tensors.get(f"transformer.{theirs}.diff", 0))
      place = params["blocks"]
      for word in ours.split("/"):
        place = place[word]
      np.testing.assert_allclose(place["kernel"][layer], wanted.T, atol=1e-6)
    bias = state["blocks.0.attn1.to_q.bias"].numpy() + number * 0.5 * tensors["transformer.blocks.0.attn1.to_q.diff_b"]
    np.testing.assert_allclose(params["blocks"]["self_attention"]["q"]["bias"][0], bias, atol=1e-6)


def test_a_tuned_expert_samples_beside_the_other_as_published(download, tmp_path):
  records = packed(tmp_path, count=2, seconds=3)
  config = published.config("tiny_wan", records, download[0], model__expert="high_noise", times__low=0.9,
                            times__given=1.0, train__steps=2, train__held_out=0, optimizer__warmup=1,
                            **SETTINGS)
  train.train(config, tmp_path / "run", say=lambda line: None)
  tuned = studio.open_run(tmp_path / "run", {"sample.steps": 4})
  up = [np.asarray(tuned.rack.get(number)["blocks"]["mlp"]["up"]["kernel"]) for number in range(2)]
  for number, name in enumerate(("transformer", "transformer_2")):
    weight = download[1][name].state_dict()["blocks.1.ffn.net.0.proj.weight"].numpy().T
    assert np.array_equal(up[number][1], weight) == (number == 1)
    assert np.abs(up[number][1] - weight).max() < 0.01  # two small steps
  more = studio.open_run(tmp_path / "run", {}, str(adapter(tmp_path / "more.safetensors", download)))
  down = [np.asarray(of.rack.get(0)["blocks"]["mlp"]["down"]["kernel"]) for of in (tuned, more)]
  assert np.abs(down[0][1] - down[1][1]).max() > 0.1 and np.array_equal(down[0][0], down[1][0])  # of layer 1 alone
  with pytest.raises(BadInput, match="for one of two experts and there is one network: leave out low_noise:"):
    origin.adapters_of("low_noise:a.safetensors", "")
  scores = sample.gallery(tuned, tmp_path / "run", ["first"], count=1, show=1, say=lambda line: None)
  assert np.isfinite(scores[0].model)
  config.model.expert = ""
  with pytest.raises(BadInput, match="holds two experts: say which, high_noise or low_noise"):
    train.train(config, tmp_path / "other")


def test_a_prompt_file_becomes_films_in_the_shape_of_their_pictures(download, still, tmp_path):
  Image.open(still).resize((64, 32)).save(tmp_path / "wide.png")
  (tmp_path / "lines.txt").write_text(f"a cat@@{still}\nthe moon, rising@@wide.png,{still}&&0,1\ntext alone\n")
  command = [sys.executable, "-m", "anisora_jax.sample", "--config=tests/tiny_wan.py", f"--pretrained={download[0]}",
             f"--prompts={tmp_path / 'lines.txt'}", "--motion=3", "--no_text", "--steps=1",
             "--guidance=1", f"--out={tmp_path / 'film'}"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  for number, size in enumerate([(48, 32), (48, 16), (48, 32)]):
    with Image.open(tmp_path / f"film-00{number}.gif") as film:
      assert film.n_frames > 1 and np.isclose(film.width / film.height, size[0] / size[1])


@pytest.fixture(scope="module")
def program():
  """The entry point, its flags in the place of those of another that a test of this process may have read."""
  theirs = {name: flags.FLAGS[name] for name in ("workdir", "out") if name in flags.FLAGS}
  for name in theirs:
    delattr(flags.FLAGS, name)
  module = importlib.import_module("anisora_jax.sample")
  yield module
  for flag in flags.FLAGS.get_flags_for_module(module.__name__):
    delattr(flags.FLAGS, flag.name)
  del sys.modules[module.__name__]
  for name, flag in theirs.items():
    flags.FLAGS[name] = flag


@pytest.mark.parametrize("words, said", [
  ("--prompts=a.txt --first=a.png --region=m.png --keep=3 --loop --prompt=cat",
   "does not read --first, --keep, --region, --loop, --prompt:"),
  ("--held_out=1 --prompts=a.txt --frames=9 --height=32 --width=32 --motion=2 --seed=4",
   "does not read --prompts, --motion, --frames, --height, --width, --seed:"),
  ("--held_out=1 --keyframe=3=a.png --loop --fit=crop", "does not read --keyframe, --loop, --fit:"),
])
def test_flags_that_would_do_nothing_are_refused_by_name(program, words, said):
  with flagsaver.flagsaver():
    flags.FLAGS(["sample", *words.split()])
    with pytest.raises(BadInput, match=said):
      program.main()


def test_a_prompt_file_s_films_are_of_the_size_that_is_asked_for(tmp_path):
  Image.new("RGB", (64, 32)).save(tmp_path / "a.png")
  (tmp_path / "lines.txt").write_text("a cat@@a.png\n")

  def request(**asked):
    return sample.orders_of(there, lines, sample.Asked(9, **asked), "", tmp_path / "a", 0)[0].request

  lines, there = str(tmp_path / "lines.txt"), unread("wan21_i2v_14b")
  assert (request().height, request().width, request().fit) == (432, 880, "stretch")  # 2 : 1 of 480 x 832 pixels
  sized = request(height=64, width=96)
  assert (sized.height, sized.width, sized.fit, request(fit="pad").fit) == (64, 96, "", "pad")


def test_guidance_of_a_second_expert_that_is_not_there_is_refused():
  for recipe, there in (("wan22_i2v_a14b", True), ("wan21_i2v_14b", False)):
    config = unread(recipe).config
    with nullcontext() if there else pytest.raises(BadInput, match="--guidance_low is of the second of two experts"):
      assert studio.changed(config, {"sample.guidance_low": 2.0}).sample.guidance_low == 2


def test_a_network_without_a_mask_is_given_whole_latent_frames_or_refuses(tokens, still, tmp_path):
  published.write(tmp_path / "t2v", replace(published.SIZE, given=0), tokens)
  made = opened((tmp_path / "t2v",), model__size="tiny_wan_t2v", sample__boundary=0.0, sample__multiplier=0.0,
                sample__steps=1)

  def latents(request: Request) -> np.ndarray:
    canvas, mask = lay_out(request, 8)
    return np.asarray(made.latents(canvas[None], mask[None], [""]))

  size = (FRAMES, HEIGHT, WIDTH, 16.0)
  one, text = latents(Request(*size, first=str(still))), latents(Request(*size))
  pixels = np.asarray(Image.open(still))[None, None].astype(np.float32) / 127.5 - 1
  assert apart(one[:, :1], np.asarray(made.codec.encode(jnp.asarray(pixels)))) < 1e-5 < apart(text, one)
  with pytest.raises(BadInput, match=r"noise time alone, and of frames 5 \.\. 8 only a part is given: give all of"):
    latents(Request(*size, first=str(still), last=str(still)))
  made.config.sample.multiplier = 0.2
  assert apart(latents(Request(*size, first=str(still)))[:, :1], one[:, :1]) > 1e-3  # it is not put back in the end
  made.config.sample.multiplier = 1.0
  with pytest.raises(BadInput, match=r"of frame 0 only a part is given with sample\.multiplier = 1"):
    latents(Request(*size, first=str(still)))


def unread(recipe: str, **sampling) -> studio.Studio:
  """A studio of a recipe's full size, whose weights are nowhere: what it refuses, it refuses before it reads any."""
  config = importlib.import_module(f"configs.{recipe}").get_config()
  config.model.kernel, config.lora.rank = "dense", 0  # cudnn needs a GPU, adapters a base
  config.sample.update(sampling)
  return studio.Studio(config, studio._of(config, 1), studio.Rack([]), "")


@pytest.mark.parametrize("recipe, size, said", [
  ("wan22_ti2v_5b", (720, 1280), "stride 16 under patches of 2: take multiples of 32, for example 704x1280"),
  ("wan21_i2v_14b", (1080, 1920), "for example 1072x1920"),
  ("wan21_i2v_14b", (1083, 1920), "for example 1072x1920"),
])
def test_a_film_that_does_not_divide_into_patches_is_refused_before_weights_are_read(recipe, size, said):
  with pytest.raises(BadInput, match=said):
    sample.make(unread(recipe), [sample.Order(Request(5, *size, 16.0), "", Path("film"), 0)])


@pytest.mark.parametrize("recipe, wide, tall, way", [("wan21_i2v_14b", 1344, 768, "stretch"),
                                                     ("wan22_ti2v_5b", 1024, 1024, "crop")])
def test_a_picture_that_gives_a_film_its_size_fits_it_as_published_and_no_other_shape_does(recipe, wide, tall, way,
                                                                                          tmp_path):
  picture = np.random.default_rng(0).integers(0, 256, (tall, wide, 3), np.uint8)
  Image.fromarray(picture).save(tmp_path / "a.png")
  Image.fromarray(picture[:tall // 2]).save(tmp_path / "b.png")
  there, still = unread(recipe), str(tmp_path / "a.png")
  size = sample.size_of(there, still, sample.Asked(5))
  canvas, _ = lay_out(Request(**size, fps=16.0, first=still, last=still), there.parts.codec.spatial)
  np.testing.assert_array_equal(canvas[[0, 4]], [given.FITS[way](picture, *canvas.shape[1:3])] * 2)
  with pytest.raises(BadInput, match=r"b.png is .*add --fit crop"):
    lay_out(Request(**size, fps=16.0, first=still, last=str(tmp_path / "b.png")), 8)
  with pytest.raises(BadInput, match=r"a.png is .*add --fit crop"):
    asked = sample.Asked(5, *canvas.shape[1:3])
    lay_out(Request(**sample.size_of(there, still, asked), fps=16.0, first=still), 8)


def test_what_a_network_without_a_mask_cannot_see_is_refused_before_the_first_film(tmp_path):
  Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
  (tmp_path / "lines.txt").write_text("a cat@@a.png\n\nthe moon@@a.png,a.png&&0,1\n")
  there = unread("pusa")
  orders = sample.orders_of(there, str(tmp_path / "lines.txt"), sample.Asked(9, 32, 48), "", tmp_path / "a", 0)
  with pytest.raises(BadInput, match=r"lines.txt, line 3: .* noise time alone, and of frames 5 \.\. 8 only a part"):
    sample.make(there, orders)


@pytest.mark.parametrize("recipe", ["pusa", "wan22_ti2v_5b", "wan21_t2v_1p3b"])
def test_held_out_clips_are_made_under_tasks_that_the_network_can_be_told_of(recipe):
  there = unread(recipe)
  there = replace(there, parts=replace(there.parts, buckets=buckets.parse("17x32x64@8")))
  sample.check_tasks(there, sample.shown_tasks(there), 4)
  for task in ("last", "box"):
    with pytest.raises(BadInput, match=rf"task '{task}': .* told of given frames by their noise time alone"):
      sample.check_tasks(there, ["none", task], 4)
  with pytest.raises(BadInput, match="did you mean 'first'"):
    sample.check_tasks(there, ["none", "frst"], 1)


def test_the_image_encoder_sees_the_picture_that_a_line_lists_first(tmp_path, monkeypatch):
  for name, grey in (("a", 51), ("b", 204)):
    Image.new("RGB", (48, 32), (grey,) * 3).save(tmp_path / f"{name}.png")
  (tmp_path / "lines.txt").write_text("@@b.png,a.png&&1,0\n@@a.png,b.png&&0,1\n")
  config, seen = tiny.get_config(), []
  config.data.buckets, config.model.size = "9x32x48@8", "tiny_seeing"
  monkeypatch.setattr(studio.image, "encode", lambda network, params, frames: frames.mean((1, 2))[:, None])
  monkeypatch.setattr(studio.Studio, "_walk", lambda self, plan, x, shown: seen.append(shown[0].image) or x)
  with published.entered(tiny_seeing=replace(published.SIZE, channels=12, given=13, image_width=published.IMAGE.width)):
    config.image.name = published.NAME
    there = studio.Studio(config, studio._of(config, 1), studio.Rack([]), "")
  there.__dict__["seeing"] = None, ()
  orders = sample.orders_of(there, str(tmp_path / "lines.txt"), sample.Asked(), "", tmp_path / "film", 0)
  sample.make(there, orders)
  assert apart(np.stack([tokens.mean() for tokens in seen]), np.float32([204, 51]) / 127.5 - 1) < 1e-5


def test_a_still_clip_leaves_means_that_json_can_hold():
  clip, mask = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 2, 2), bool)
  rows = [sample.Shown("first", "", clip, mask, clip, {"model": 30.0, "repeat first": psnr}) for psnr in (np.inf, 20.0)]
  made = sample.score(rows)
  assert (made.model, made.baselines) == (30, {"repeat first": (sample.EXACT + 20) / 2})


WRONG = {  # what is changed -> what is said
  "no weights at all": ({"pretrained": ""}, "no weights to sample from"),
  "an adapter that is not there": ({"model.adapters": "none.safetensors"}, "none.safetensors do not exist"),
  "an adapter that counts a word": ({"model.adapters": "a.safetensors=much"}, "write FILE=0.8"),
  "an unknown solver": ({"sample.solver": "eulr"}, "did you mean 'euler'"),
  "a boundary beyond time": ({"sample.boundary": 1.5}, "noise time in [0, 1]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(case, download, still, tmp_path):
  changes, said = WRONG[case]
  with pytest.raises(BadInput) as mistake:
    made = opened(download, changes)
    made.rack.get(0)
    sample.make(made, [sample.Order(Request(FRAMES, HEIGHT, WIDTH, 16.0, first=str(still)), "", tmp_path / "a", 0)])
  assert said in str(mistake.value) and "\n" not in str(mistake.value)
