"""The main job in a few minutes: draws cartoons, trains a tiny model, kills and resumes it, and makes films.

  python launch/quickstart.py --out out/quickstart

It only runs the commands that a user would run, prints each, and checks that the killed run went on exactly.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

OUT = flags.DEFINE_string("out", "out/quickstart", "Folder for films, records, the run and its samples.")
FILMS = flags.DEFINE_integer("films", 24, "Cartoons to draw.", lower_bound=2)
STEPS = flags.DEFINE_integer("steps", 200, "Training steps.", lower_bound=40)
HELD_OUT = flags.DEFINE_integer("held_out", 8, "Held-out clips that each task is measured on.", lower_bound=1)

ROOT = Path(__file__).resolve().parents[1]
TASKS = "first,first_last,keyframes,continuation,character"


def start(*words: str) -> subprocess.Popen:
  """Prints a command and starts it."""
  print(f"\n+ python {' '.join(words)}", flush=True)
  return subprocess.Popen([sys.executable, *words], cwd=ROOT)


def run(*words: str) -> None:
  """Runs a command to its end; if it fails, so do we, with its status."""
  status = start(*words).wait()
  if status:
    sys.exit(status)


def attempts(measures: Path) -> list[dict[int, dict]]:
  """What each attempt of a run reported, by step: steps that were done twice are in two of them."""
  found: list[dict[int, dict]] = []
  for line in measures.read_text().splitlines() if measures.exists() else []:
    try:
      row = json.loads(line)
    except ValueError:  # the line that the kill tore
      continue
    if "start" in row:
      found.append({})
    elif "loss" in row:
      found[-1][row["step"]] = row
  return found


def train_and_kill(command: list[str], run_folder: Path, step: int) -> None:
  """Starts training and kills it, as a power cut would, once it has reported `step`."""
  training = start(*command)
  while training.poll() is None:
    done = attempts(run_folder / "measures.jsonl")
    if done and max(done[-1], default=0) >= step:
      training.send_signal(signal.SIGKILL)
      training.wait()
      print(f"\nkilled at step {max(done[-1])} (kill -9); the same command goes on:", flush=True)
    time.sleep(0.05)
  if training.returncode != -signal.SIGKILL:
    sys.exit(training.returncode or f"training ended before step {step}, where it was to be killed.")


def done_twice(measures: Path) -> dict[int, bool]:
  """step -> whether it was the same again, of those that were done before a kill and after it."""
  found: dict[int, bool] = {}
  for before, after in itertools.combinations(attempts(measures), 2):
    for step in set(before) & set(after):
      same = all(before[step][name] == after[step][name] for name in ("loss", "grad_norm", "records"))
      found[step] = same and found.get(step, True)
  return dict(sorted(found.items()))


def check_resume(measures: Path) -> None:
  """Compares the steps that were done twice."""
  twice = done_twice(measures)
  if not (twice and all(twice.values())):
    sys.exit(f"the resumed run is not the killed one: steps done twice, and whether equal: {twice}")
  print(f"\nresumed exactly: steps {min(twice)} to {max(twice)} were done twice, with the same records, losses and "
        "gradient norms to the last bit.")


def main(_: list[str]) -> None:
  began = time.time()
  out = Path(OUT.value)
  films, records, folder = (str(out / name) for name in ("films", "records", "run"))
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((out / "compiled").absolute()))
  os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")  # a step as fast, compiled in half the time
  run("data/toons.py", "--out", films, "--films", str(FILMS.value), "--seconds", "10")
  run("data/pack.py", "--films", films, "--out", records, "--clip_seconds", "1")
  train = ["-m", "anisora_jax.train", "--config", "configs/tiny.py", "--workdir", folder, "--cpu_devices", "8",
           "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.seq=2", f"--config.data.records={records}",
           f"--config.train.steps={STEPS.value}", f"--config.train.checkpoint={STEPS.value // 4}",
           f"--config.train.held_out={STEPS.value // 4}", "--config.train.report=2"]
  if not done_twice(Path(folder) / "measures.jsonl"):
    train_and_kill(train, Path(folder), STEPS.value // 2 + 6)
  run(*train)
  check_resume(Path(folder) / "measures.jsonl")
  run("-m", "anisora_jax.sample", "--workdir", folder, "--held_out", str(HELD_OUT.value), "--tasks", TASKS,
      "--show", "2")
  print(f"\nquickstart took {time.time() - began:.0f} s. Open {folder}/samples/report.html")


if __name__ == "__main__":
  app.run(main)
