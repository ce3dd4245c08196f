"""Measures -> progress bar or lines, TensorBoard, measures.jsonl; and how fast the steps went.

measures.jsonl: {"start": n} when a run starts or resumes after step n, then one object a reported step. What is read
back is one run: steps that were done again count once, as done last; a torn last line counts as not written.
"""

import json
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm

from anisora_jax.errors import BadInput
from anisora_jax.training.append import Append
from anisora_jax.training.board import Board

# Part of a device's kind, as JAX names it -> dense bf16 FLOP/s, from the makers' data sheets. First match counts.
PEAKS = {"H100 PCIe": 7.56e14, "H100": 9.89e14, "H200": 9.89e14, "A100": 3.12e14, "TPU v6": 9.18e14,
         "TPU v5 lite": 1.97e14, "TPU v5e": 1.97e14, "TPU v5": 4.59e14, "TPU v4": 2.75e14}
SECONDS_PER_LINE = 10.0  # where there is no bar
NAMED = 32  # records left out that are named, a power of two


def peak(kind: str) -> float | None:
  """bf16 FLOP/s that one device can do at most, or None for a kind that is not in the table."""
  return next((flops for name, flops in PEAKS.items() if name in kind), None)


def open_end(path: Path) -> None:
  """Cuts a torn last line off a JSONL file, so that the next line is not written onto it."""
  if path.exists():
    whole = path.read_bytes()
    if not whole.endswith(b"\n"):
      with path.open("rb+") as file:
        file.truncate(whole.rfind(b"\n") + 1)


def read_measures(path: str | Path) -> list[dict]:
  """One dict a reported step, in the order of the steps. A value that was not finite is NaN.

  Raises BadInput for a file that is missing or spoilt elsewhere than in its last line.
  """
  path = Path(path)
  if not path.is_file():
    raise BadInput(f"{path} does not exist: give the measures.jsonl of a run's folder.")
  steps: dict[int, dict] = {}
  *lines, _ = path.read_bytes().split(b"\n")  # what follows the last newline is torn, or nothing
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
      start, step = record.get("start"), int(record.get("step", 0))
    except (ValueError, TypeError, AttributeError):
      raise BadInput(f"{path} line {number} is not a record of a step: delete that line.") from None
    if start is not None:
      steps = {step: record for step, record in steps.items() if step <= start}
    else:
      steps[step] = steps.get(step, {}) | {name: math.nan if v is None else v for name, v in record.items()}
  return [steps[step] for step in sorted(steps)]


class Clock:
  """Speed over the last steps: of the median step, so that one compilation does not speak for all.

  window: how many steps. peak: FLOP/s of all devices together, or None if unknown.
  """

  def __init__(self, window: int = 32, peak: float | None = None):
    self._steps: deque[tuple[float, float, int, float]] = deque(maxlen=window)
    self._peak, self._saving = peak, 0.0

  def step(self, seconds: float, waited: float, tokens: int = 0, flops: float = 0.0) -> None:
    """One step: its seconds, those of them spent waiting for the loader, tokens and model FLOPs of its global batch."""
    self._steps.append((seconds, waited, tokens, flops))

  def saved(self, seconds: float) -> None:
    """A checkpoint held the trainer up for so long."""
    self._saving += seconds

  def rates(self) -> dict[str, float]:
    """step_seconds, data_wait (a share, at most what the loader costs: the device may have been busy meanwhile),
    checkpoint_seconds (since asked last) and, where known, tokens_per_second, flops_per_second and mfu, their share of
    the peak. Model FLOPs: what is computed twice to save memory counts once.
    """
    seconds, waited, tokens, flops = zip(*self._steps, strict=True)
    rates = {"step_seconds": statistics.median(seconds),
             "data_wait": statistics.median(w / s for w, s in zip(waited, seconds, strict=True)),
             "checkpoint_seconds": self._saving}
    self._saving = 0.0
    if any(tokens):
      rates["tokens_per_second"] = statistics.median(n / s for n, s in zip(tokens, seconds, strict=True))
    if any(flops):
      rates["flops_per_second"] = statistics.median(n / s for n, s in zip(flops, seconds, strict=True))
      if self._peak:
        rates["mfu"] = rates["flops_per_second"] / self._peak
    return rates


class LeftOut:
  """Says each record of a split that could not be read once, when it is met; of a heap, how many they are by now."""

  def __init__(self, say: Callable[[str], None], split: str):
    self._say, self._split, self._met = say, split, set[str]()

  def __call__(self, bad: list[tuple[str, str]]) -> None:
    """bad: names and reasons, which it takes out of the list."""
    for name, reason in bad:
      if name in self._met:
        continue
      before = len(self._met)
      self._met.add(name)
      if before < NAMED:
        self._say(f"left out of {self._split}: {name}: {reason}")
      elif before.bit_count() == 1:  # told whenever they have doubled
        self._say(f"left out of {self._split}: {before + 1} records by now, no longer named.")
    bad.clear()


class Report:
  """Writes what is measured; on every host but the first it does nothing. Use as a context manager.

  start: the step that the run resumes after, 0 for a new run. steps: where it ends.
  """

  def __init__(self, folder: str | Path, start: int, steps: int, leads: bool = True,
               clock: Callable[[], float] = time.monotonic):
    self._leads, self._steps, self._clock, self._last = leads, steps, clock, -math.inf
    self._first: tuple[int, float] | None = None
    if not leads:
      return
    folder = Path(folder)
    open_end(folder / "measures.jsonl")
    self._lines = Append(folder / "measures.jsonl", self.say)
    self._board = Board(folder / "tensorboard", start, self.say)
    self._write({"start": start})
    seen = sys.stderr.isatty() or "ipykernel" in sys.modules
    self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True) if seen else None

  def __enter__(self) -> "Report":
    return self

  def __exit__(self, *_: object) -> None:
    if self._leads:
      self._lines.close()
      self._board.close()
      if self._bar is not None:
        self._bar.close()

  def __call__(self, step: int, measures: dict[str, float | int]) -> None:
    """Reports one step. TensorBoard gets the floats; whole numbers (which records, stop) only the JSONL file."""
    if not self._leads:
      return
    self._write({"step": step, **measures})
    scalars = {name: value for name, value in measures.items() if isinstance(value, float)}
    self._board(step, scalars)
    text, now = ", ".join(f"{name} {value:.4g}" for name, value in scalars.items()), self._clock()
    self._first = self._first or (step, now)
    if self._bar is not None:
      self._bar.update(step - self._bar.n)
      self._bar.set_postfix_str(text)
    elif "held_out" in scalars or step >= self._steps or now - self._last >= SECONDS_PER_LINE:
      self._last = now
      print(f"step {step}/{self._steps}: {text}{self._left(step, now)}", file=sys.stderr, flush=True)

  def _left(self, step: int, now: float) -> str:
    """The time left, as steps took since the first report, which came after the compilation."""
    first, began = self._first
    if not first < step < self._steps:
      return ""
    return f", {tqdm.format_interval((self._steps - step) * (now - began) / (step - first))} left"

  def say(self, line: str) -> None:
    """One line for the user, above the bar."""
    if self._leads:
      tqdm.write(line, file=sys.stderr)

  def _write(self, record: dict) -> None:
    # JSON has no NaN.
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    self._lines(json.dumps(clean).encode() + b"\n")
