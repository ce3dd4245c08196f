"""Curates films: cuts them into shots, measures, chooses, captions and packs those worth learning from.

  python data/curate.py --films out/films --out out/curated --config configs/curation.py

--films is a folder, searched to any depth, or a pattern in quotes, 'FILMS/**.mkv'. The stages, each with its settings
in the config, every field of which is a flag (--config.cut.longest=10):

  probe        is it a film? What can be mended (variable rate, rotation, HDR, a torn end) is mended while reading
  cut          shots between cuts and fades, without black borders, still stretches and flashes
  measure      motion, camera, text on the picture, sharpness, flatness, brightness; scores of your own models
  keep         rules on what was measured, a reason for each clip that they turn away
  deduplicate  copies of one clip, re-encoded, scaled, cropped or marked, within and across films; the best one stays
  budget       of the ranked clips, as many as a budget of training is best spent on
  describe     captions: from files beside the films, from your captioner, or from what was measured
  pack         clips as records to train on, with index, checksums, licence and provenance; also as a TFDS dataset

Beside a film NAME.mp4 may stand NAME.txt with its caption, NAME.json with "caption", "licence", "source" or "shots",
and NAME.masks.npz with the tracked character, as data/toons.py writes them. Films with equal or copied clips go to
train or held_out together.

OUT/work keeps what each stage found. The same command goes on after a kill at any moment; with another setting it
redoes only what depends on it. OUT/report.html shows what was kept, what was not, and why.

It runs on Apache Beam: on this machine with --workers processes, or anywhere with --runner=FlinkRunner,
SparkRunner, DataflowRunner or PrismRunner and --beam_options='--flink_master=HOST:8081 ...'. Workers elsewhere need
this repository on PYTHONPATH, with its folder data, and films and OUT under the same paths.
"""

import logging
import os
import sys
from pathlib import Path

import command
from absl import flags
from ml_collections import config_flags

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/curation.py"


def define_flags() -> None:
  flags.DEFINE_string("films", None, "Folder of films, or a pattern of their names in quotes.", required=True)
  flags.DEFINE_string("out", None, "Folder the records, the report and the work folder are written to.", required=True)
  flags.DEFINE_string("runner", "FnApiRunner", "Of Beam. FnApiRunner works in this process; DirectRunner may fetch "
                      "Prism and hand over to it.")
  flags.DEFINE_string("beam_options", "", "More options of Beam, as on its command line.")
  flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes that read films on this machine.")
  flags.DEFINE_bool("retry", False, "Try those films again that crashed or ran out of time in an earlier run.")
  config_flags.DEFINE_config_file("config", str(ROOT / CONFIG), f"Config file; {CONFIG} explains every field, each of "
                                  "which is a flag, --config.STAGE.FIELD=VALUE.")


def main(given: flags.FlagValues) -> None:
  """Reads the config into the settings of the stages and runs them."""
  logging.disable(logging.ERROR)  # Beam talks of its own affairs, and what fails is raised anyway
  try:
    from curation import pipeline, run, settings
  except ModuleNotFoundError as missing:
    raise command.errors.BadInput(f"{missing.name} is not installed: pip install 'anisora_jax[curation]'.") from missing
  paths = [str(ROOT / "data"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
  os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for processes that Beam starts
  sys.path[:0] = [str(ROOT)]
  runner = pipeline.Runner(given.runner, given.workers, given.beam_options)
  run.curate(given.films, Path(given.out), settings.read(given.config), runner, retry=given.retry)


if __name__ == "__main__":
  command.run(define_flags, main)
