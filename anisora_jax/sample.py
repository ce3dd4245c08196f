"""Makes films with a trained run.

  python -m anisora_jax.sample --workdir out/run --first a.png --last b.png --out between     in-betweens
  python -m anisora_jax.sample --workdir out/run --first a.png --loop --out round             a loop
  python -m anisora_jax.sample --workdir out/run --keyframe 0=a.png --keyframe 5=b.png        keyframes
  python -m anisora_jax.sample --workdir out/run --clip c.mp4 --keep 4                        goes on from 4 frames
  python -m anisora_jax.sample --workdir out/run --clip c.mp4 --region mask.png               redraws what is black
  python -m anisora_jax.sample --workdir out/run --held_out 16 --tasks first,first_last       held-out clips and report

Each film comes as mp4, gif and a contact sheet. Sampling settings of the run's config can be changed by flags.
"""

import sys
from pathlib import Path

from absl import flags

from anisora_jax import entry
from anisora_jax.errors import BadInput
from anisora_jax.experiment import sample
from anisora_jax.sampling.request import Request, parse_keyframes

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.")
OUT = flags.DEFINE_string("out", "film", "Name of what is written: OUT.mp4, OUT.gif, OUT.png.")
FIRST = flags.DEFINE_string("first", "", "Picture of the first frame: png, jpg, or mp4 for its first frame.")
LAST = flags.DEFINE_string("last", "", "Picture of the last frame.")
KEYFRAME = flags.DEFINE_multi_string("keyframe", [], "FRAME=PICTURE; may be given many times.")
CLIP = flags.DEFINE_string("clip", "", "Film to go on from (with --keep) or to redraw in part (with --region).")
KEEP = flags.DEFINE_integer("keep", 0, "First frames of --clip that are given.", lower_bound=0)
REGION = flags.DEFINE_string("region", "", "Mask, still or film: white is given, black is made.")
LOOP = flags.DEFINE_bool("loop", False, "End where --first began, so that the film can be repeated.")
PROMPT = flags.DEFINE_string("prompt", "", "What the film shows, in words.")
FRAMES = flags.DEFINE_integer("frames", None, "Frames of the film; by default as in training.", lower_bound=1)
HEIGHT = flags.DEFINE_integer("height", None, "Rows of pixels; by default as in training.", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", None, "Columns of pixels; by default as in training.", lower_bound=1)
FIT = flags.DEFINE_enum("fit", "", ["", "crop", "pad", "stretch"], "How pictures of another aspect come to size.")
SEED = flags.DEFINE_integer("seed", 0, "Of the noise: another seed, another film.", lower_bound=0)
HELD_OUT = flags.DEFINE_integer("held_out", 0, "Remake so many held-out clips instead, and write a report.",
                                lower_bound=0)
TASKS = flags.DEFINE_list("tasks", ["first", "first_last", "keyframes", "continuation", "character"],
                          "Tasks of the held-out clips.")
SHOW = flags.DEFINE_integer("show", 2, "Held-out clips of each task that become films.", lower_bound=0)
SETTINGS = {
  "solver": flags.DEFINE_string("solver", None, "euler, heun or unipc; by default as in the run's config."),
  "steps": flags.DEFINE_integer("steps", None, "Sampling steps.", lower_bound=1),
  "shift": flags.DEFINE_float("shift", None, "Push of the steps toward noise.", lower_bound=1e-3),
  "guidance": flags.DEFINE_float("guidance", None, "How strongly to follow the prompt; 1 is a single pass.",
                                 lower_bound=0),
  "multiplier": flags.DEFINE_float("multiplier", None, "Noise left on given frames, 0 .. 1; 0 keeps them exact.",
                                   lower_bound=0, upper_bound=1),
}


def main() -> None:
  """Reads the flags and calls the assembly."""
  folder = Path(entry.needed("workdir", "out/run"))
  keyframes = parse_keyframes(KEYFRAME.value)
  if HELD_OUT.value and (FIRST.value or LAST.value or CLIP.value or keyframes):
    raise BadInput("--held_out takes its frames from the records: leave out --first, --last, --keyframe and --clip.")
  studio = sample.restore(folder, {name: flag.value for name, flag in SETTINGS.items()})
  if HELD_OUT.value:
    sample.gallery(studio, folder, TASKS.value, HELD_OUT.value, SHOW.value)
    return
  like = studio.parts.buckets[0]
  request = Request(FRAMES.value or like.frames, HEIGHT.value or like.height, WIDTH.value or like.width,
                    studio.config.data.fps, FIRST.value, LAST.value, keyframes, CLIP.value, KEEP.value, REGION.value,
                    LOOP.value, FIT.value)
  sample.make(studio, request, PROMPT.value, Path(OUT.value), SEED.value)
  print(f"look at {OUT.value}.mp4, {OUT.value}.gif and {OUT.value}.png")


if __name__ == "__main__":
  entry.run(main, sys.argv[0], __doc__)
