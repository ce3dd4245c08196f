"""Makes films with a trained run, or with published weights.

  python -m anisora_jax.sample --workdir out/run --first a.png --last b.png --out between     in-betweens
  python -m anisora_jax.sample --workdir out/run --first a.png --loop --out round             a loop
  python -m anisora_jax.sample --workdir out/run --keyframe 0=a.png --keyframe 5=b.png        keyframes
  python -m anisora_jax.sample --workdir out/run --clip c.mp4 --keep 4                        goes on from 4 frames
  python -m anisora_jax.sample --workdir out/run --clip c.mp4 --region mask.png               redraws what is black
  python -m anisora_jax.sample --workdir out/run --held_out 16 --tasks first,first_last       held-out clips and report
  python -m anisora_jax.sample --config configs/anisora_v3.py --pretrained Index-anisora-V3 \\
    --prompts lines.txt --motion 3 --out films/a                                              AniSora's prompt files

A line of a prompt file is PROMPT@@a.png,b.png&&0,0.5: pictures and where they stand, 0 first frame .. 1 last frame.
Each film comes as mp4, gif and a contact sheet. Sampling settings of the run's config can be changed by flags.
"""

import sys
from pathlib import Path

from absl import flags

from anisora_jax import entry
from anisora_jax.errors import BadInput
from anisora_jax.experiment import sample, studio
from anisora_jax.sampling import prompts
from anisora_jax.sampling.request import Request, parse_keyframes

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.")
OUT = flags.DEFINE_string("out", "film", "Name of what is written: OUT.mp4, OUT.gif, OUT.png.")
FIRST = flags.DEFINE_string("first", "", "Picture of the first frame: png, jpg, or mp4 for its first frame.")
LAST = flags.DEFINE_string("last", "", "Picture of the last frame.")
KEYFRAME = flags.DEFINE_multi_string("keyframe", [], "FRAME=PICTURE; may be given many times.")
CLIP = flags.DEFINE_string("clip", "", "Film to go on from (with --keep) or to redraw in part (with --region).")
KEEP = flags.DEFINE_integer("keep", 0, "First frames of --clip that are given.", lower_bound=0)
REGION = flags.DEFINE_string("region", "", "Mask, still or film: white is given, black is made, from the "
                             "second frame on; the first is given whole.")
LOOP = flags.DEFINE_bool("loop", False, "End where --first began, so that the film can be repeated.")
PROMPT = flags.DEFINE_string("prompt", "", "What the film shows, in words.")
PROMPTS = flags.DEFINE_string("prompts", "", "Prompt file, a film a line, instead of --prompt and pictures.")
MOTION = flags.DEFINE_float("motion", None, "Motion score that ends every prompt, as AniSora was trained.")
AESTHETIC = flags.DEFINE_float("aesthetic", None, "Aesthetic score, likewise.")
CAMERA = flags.DEFINE_string("camera", None, "Camera motion, likewise, for example 'tilt up'.")
NO_TEXT = flags.DEFINE_bool("no_text", False, "Say in the prompt that there is no text in the film.")
FRAMES = flags.DEFINE_integer("frames", None, "Frames of the film; by default as in training.", lower_bound=1)
HEIGHT = flags.DEFINE_integer("height", None, "Rows of pixels; by default as in training.", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", None, "Columns of pixels; by default as in training.", lower_bound=1)
FIT = flags.DEFINE_enum("fit", "", ["", "crop", "pad", "stretch"], "How pictures of another aspect come to size; by "
                        "default the one that gives the film its size does as published, and others are refused.")
SEED = flags.DEFINE_integer("seed", 0, "Of the noise: another seed, another film.", lower_bound=0)
HELD_OUT = flags.DEFINE_integer("held_out", 0, "Remake so many held-out clips instead, and write a report.",
                                lower_bound=0)
TASKS = flags.DEFINE_list("tasks", None, "Tasks of the held-out clips; by default first,first_last,keyframes,"
                          "continuation,character, and of a network without a mask first,continuation.")
SHOW = flags.DEFINE_integer("show", 2, "Held-out clips of each task that become films.", lower_bound=0)
ADAPTERS = flags.DEFINE_string("adapters", "", "Adapter files to add: FILE, FILE=0.8, low_noise:FILE, with commas.")
SETTINGS = {  # field of the config -> flag
  "sample.solver": flags.DEFINE_string("solver", None, "euler, heun or unipc; by default as in the run's config."),
  "sample.steps": flags.DEFINE_integer("steps", None, "Sampling steps.", lower_bound=1),
  "sample.shift": flags.DEFINE_float("shift", None, "Push of the steps toward noise.", lower_bound=1e-3),
  "sample.guidance": flags.DEFINE_float("guidance", None, "How strongly to follow the prompt; 1 is a single pass.",
                                        lower_bound=0),
  "sample.guidance_low": flags.DEFINE_float("guidance_low", None, "The same for the second of two experts."),
  "sample.negative": flags.DEFINE_string("negative", None, "What the film shall not show, where guidance is not 1."),
  "sample.multiplier": flags.DEFINE_float("multiplier", None, "Noise left on given frames, 0 .. 1; 0 keeps them exact.",
                                          lower_bound=0, upper_bound=1),
  "sample.area": flags.DEFINE_integer("area", None, "Pixels of a film in its first picture's shape.", lower_bound=0),
  "model.kernel": flags.DEFINE_string("kernel", None, "Of attention, here; by default as in the run's config. Where no "
                                      "NVIDIA GPU is, a run of cudnn needs blockwise, or splash on TPUs."),
  "model.attention": flags.DEFINE_string("attention", None, "How devices that share a film talk, likewise."),
  "pretrained": flags.DEFINE_string("pretrained", None, "Folder of a Wan, AniSora or diffusers download."),
  "data.records": flags.DEFINE_string("records", None, "Clips for --held_out, of a run that was trained on latents."),
}


FILM = [FIRST, LAST, KEYFRAME, CLIP, KEEP, REGION, LOOP, PROMPT]
UNREAD = (  # what brings its own films -> flags that it does not read
  (HELD_OUT, [*FILM, PROMPTS, MOTION, AESTHETIC, CAMERA, NO_TEXT, FRAMES, HEIGHT, WIDTH, FIT, SEED]),
  (PROMPTS, FILM),
)


def main() -> None:
  """Reads the flags and calls the assembly."""
  for whole, unread in UNREAD:
    given = ", ".join(f"--{flag.name}" for flag in unread if flag.value != flag.default)
    if whole.value and given:
      raise BadInput(f"--{whole.name} brings its own films and does not read {given}: leave that out.")
  keyframes = parse_keyframes(KEYFRAME.value)
  if WORKDIR.value and entry.CONFIG.value is not None:
    raise BadInput(f"--config was given beside --workdir {WORKDIR.value}, a run, which has its own: leave out one of "
                   "them; settings of a run are flags, as --steps 4.")
  out = Path(OUT.value) if HELD_OUT.value else sample.out_of(OUT.value)
  changes = {name: flag.value for name, flag in SETTINGS.items()}
  if changes["data.records"]:
    changes["data.encoded"] = False
  if entry.CONFIG.value is None:
    made = studio.open_run(Path(entry.needed("workdir", "out/run")), changes, ADAPTERS.value)
  else:
    made = studio.open_weights(entry.config(), changes, ADAPTERS.value)
  if HELD_OUT.value:
    sample.gallery(made, Path(WORKDIR.value or out), TASKS.value or (), HELD_OUT.value, SHOW.value)
    return
  asked = sample.Asked(FRAMES.value, HEIGHT.value, WIDTH.value, FIT.value)
  ending = prompts.suffix(AESTHETIC.value, MOTION.value, CAMERA.value, NO_TEXT.value)
  if PROMPTS.value:
    orders = sample.orders_of(made, PROMPTS.value, asked, ending, out, SEED.value)
  else:
    first = FIRST.value or next((keyframes[frame] for frame in sorted(keyframes)), LAST.value)
    size = sample.size_of(made, first, asked)
    request = Request(**size, fps=made.config.data.fps, first=FIRST.value, last=LAST.value, keyframes=keyframes,
                      clip=CLIP.value, keep=KEEP.value, region=REGION.value, loop=LOOP.value)
    orders = [sample.Order(request, f"{PROMPT.value} {ending}".strip(), out, SEED.value)]
  sample.make(made, orders)
  for order in orders:
    print(f"look at {order.out}.mp4, {order.out}.gif and {order.out}.png")


if __name__ == "__main__":
  entry.run(main, sys.argv[0], __doc__)
