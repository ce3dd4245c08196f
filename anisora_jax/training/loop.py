"""The order of effects: next batch, step, and what is due after it. What a step computes is not its business.

Two things here are not obvious. Measures are fetched one step late, so that the device always has a step to do while
the host reads the last one's. And the wish to stop travels through the step: each host puts its own into the batch, the
step returns the maximum, so all hosts learn of it at the same step, and none waits for another that has left.
"""

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from anisora_jax.errors import BadInput
from anisora_jax.training.report import Clock
from anisora_jax.training.stop import Stop

PATIENCE = 8  # steps in a row that may be skipped because they were not finite


@runtime_checkable
class Loader(Protocol):
  """position: JSON; where to go on after the batches handed out."""

  position: dict

  def __next__(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Due:
  """steps: the run's last step. report, held_out, checkpoint: after every so many; 0 = never (a checkpoint always ends
  the run). held_out_batches: in one held-out loss."""

  steps: int
  report: int = 10
  held_out: int = 0
  checkpoint: int = 0
  held_out_batches: int = 1

  def __post_init__(self):
    for name, least in {"steps": 1, "report": 0, "held_out": 0, "checkpoint": 0, "held_out_batches": 1}.items():
      if getattr(self, name) < least:
        raise BadInput(f"{name} is {getattr(self, name)}: it must be {least} or more.")


@dataclass(frozen=True)
class Effects:
  """What the loop does to the world, as functions.

  place: host batch (a dict of arrays and captions, with "stop" int32 [b]) -> what the step takes
  rate: number of a step -> its learning rate
  work: host batch -> tokens and model FLOPs of the global batch, 0 where unknown
  ids: host batch -> int64, which records the global batch holds, in its order; hosts call it at the same steps
  held_out: state -> measures
  save: step, state, loader position -> returns as soon as the state may be donated
  wait: until the last save is finished, or raise
  report: step, measures;  say: a line for the user
  """

  place: Callable[[dict], Any]
  rate: Callable[[int], float]
  work: Callable[[dict], tuple[int, float]]
  ids: Callable[[dict], np.ndarray]
  held_out: Callable[[Any], dict]
  save: Callable[[int, Any, dict], Any]
  wait: Callable[[], None]
  report: Callable[[int, dict], None]
  say: Callable[[str], None]


@dataclass(frozen=True)
class Pending:
  """A step that was dispatched and whose measures are still on the device; seconds waited for its batch."""

  number: int
  measures: dict[str, Any]
  batch: dict[str, Any]
  waited: float


def named(ids: np.ndarray) -> str:
  """The records of a batch, of whose ids `loaders.mixture` tells: "3, 7 of source 0; 2 of source 1"."""
  found: dict[int, list[str]] = {}
  for record in np.unique(ids[ids >= 0] % 2**48).tolist():
    found.setdefault(record // 2**32, []).append(str(record % 2**32))
  return "; ".join(f"{', '.join(records)} of source {source}" for source, records in found.items())


class Settling:
  """Takes the measures of finished steps, in order: clock, report, skipped steps, the wish to stop."""

  def __init__(self, effects: Effects, due: Due, clock: Clock):
    self.effects, self.due, self.clock = effects, due, clock
    self.skipped: list[int] = []
    self.since = time.perf_counter()

  def settle(self, step: Pending) -> bool:
    """Waits for a step's measures and says whether any host wishes to stop."""
    measures = {name: value.item() for name, value in jax.device_get(step.measures).items()}
    now = time.perf_counter()
    self.clock.step(now - self.since, step.waited, *self.effects.work(step.batch))
    self.since = now
    last = step.number == self.due.steps or measures["stop"]
    if last or measures["skipped"] or (self.due.report and step.number % self.due.report == 0):
      ids = self.effects.ids(step.batch)
      records = zlib.crc32(np.ascontiguousarray(ids).tobytes())  # as one number that two runs can compare
      if measures["skipped"]:
        self.effects.say(f"step {step.number}: loss {measures['loss']}, the update is left out; records: {named(ids)}.")
      measures |= {"rate": self.effects.rate(step.number), **self.clock.rates(), "records": records}
      self.effects.report(step.number, measures)
    self._count_skipped(step.number, bool(measures["skipped"]))
    return bool(measures["stop"])

  def pause(self) -> float:
    """Starts a step's time anew after something that is no part of a step; returns the seconds it took."""
    paused, self.since = time.perf_counter() - self.since, time.perf_counter()
    return paused

  def _count_skipped(self, number: int, skipped: bool) -> None:
    self.skipped = [*self.skipped, number] if skipped else []
    if len(self.skipped) == PATIENCE:
      raise BadInput(f"{PATIENCE} steps in a row ({self.skipped[0]} to {number}) had a loss or gradient that was "
                     f"not finite: go on with a lower optimizer.rate or optimizer.clip, or look at the records named "
                     f"above; the last checkpoint is good.")


def run(state: Any, step: Callable[[Any, Any], tuple[Any, dict]], batches: Loader, due: Due, effects: Effects,
        stop: Stop, clock: Clock) -> tuple[Any, int, bool]:
  """Trains from `state.step` to `due.steps`; returns the state, its step, and whether a signal stopped it before.

  step: (state, placed batch) -> (state, measures); measures are scalars, among them loss, skipped (1 if the update was
  left out because it was not finite) and stop (maximum of the batch's). It may donate the state.
  However it ends, save for an error, the last step is in a checkpoint; never is one step saved twice.
  Raises BadInput when 8 steps in a row are not finite, and when the last checkpoint cannot be written.
  """
  settling = Settling(effects, due, clock)
  pending: Pending | None = None
  number = saved = int(state.step)
  stopping = False
  while number < due.steps and not stopping:
    number += 1
    began = time.perf_counter()
    batch = next(batches)
    waited = time.perf_counter() - began
    batch["stop"] = np.full(len(batch["id"]), stop.asked, np.int32)
    state, measures = step(state, effects.place(batch))
    before, pending = pending, Pending(number, measures, batch, waited)
    stopping = before is not None and settling.settle(before)
    for_held_out, for_checkpoint = (every > 0 and number % every == 0 for every in (due.held_out, due.checkpoint))
    if for_held_out or for_checkpoint or stopping or number == due.steps:
      # What follows waits for this step anyway; settled first, its time is its own and a bad step is known.
      stopping = settling.settle(pending) or stopping
      pending = None
    if for_held_out and not stopping:
      effects.report(number, effects.held_out(state))
      settling.pause()
    if for_checkpoint:
      effects.save(number, state, batches.position)
      clock.saved(settling.pause())
      saved = number
  if number != saved:
    effects.save(number, state, batches.position)
  effects.wait()
  return state, number, stopping and number < due.steps
