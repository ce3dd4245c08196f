"""The stages on Apache Beam. Everything else of curation works without it.

What a film gives is stored by the stages themselves (`store`), on a folder that every worker sees, so elements are
small and a bundle that a runner repeats costs nothing. On one machine the workers are threads of Beam's own runner,
each with a `child` process in which films are read.
"""

import json
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam import runners
from apache_beam.options.pipeline_options import PipelineOptions

from anisora_jax.errors import BadInput
from curation import duplicates
from curation.child import Child, Limits
from curation.store import land

MISTAKE = "mistake.json"


@dataclass(frozen=True)
class Runner:
  """Where the work is done. name: a runner of Beam. options: of Beam, as on a command line."""
  name: str = "FnApiRunner"
  workers: int = 1
  options: str = ""

  def __post_init__(self):
    if self.workers < 1:
      raise BadInput(f"--workers is {self.workers}: at least one process must do the work.")
    known = ("beam_options", self.options, shlex.split), ("runner", self.name, runners.create_runner)
    for flag, given, read in known:
      try:
        read(given)
      except (ValueError, ImportError) as error:
        why = " ".join(str(error).split())[:200]
        raise BadInput(f"--{flag} {given} cannot be used ({why}); see https://beam.apache.org.") from error

  def beam_options(self) -> PipelineOptions:
    local = [f"--direct_num_workers={self.workers}",
             f"--direct_running_mode={'multi_threading' if self.workers > 1 else 'in_memory'}"]
    return PipelineOptions([f"--runner={self.name}", *local, *shlex.split(self.options)])


@dataclass(frozen=True)
class Work:
  """function(child, item, *arguments) yields results; limits: of the child."""
  function: Callable[..., Iterator]
  arguments: tuple
  limits: Limits

  def __call__(self, child: Child, item: Any) -> Iterator:
    return self.function(child, item, *self.arguments)


class _InChild(beam.DoFn):
  """Does the work of an item with a child process that is kept from item to item. folder: of all results."""

  def __init__(self, work: Work, folder: Path):
    self._work, self._folder = work, folder

  def setup(self) -> None:
    self._child = Child(self._work.limits)

  def process(self, element: tuple[int, Any]) -> Iterator:
    (_, items) = element
    for item in items:
      try:
        yield from self._work(self._child, item)
      except BadInput as mistake:
        # Runners wrap what a worker raises in their own errors, and some only print it.
        land(self._folder / MISTAKE, json.dumps(str(mistake)).encode())
        raise

  def teardown(self) -> None:
    self._child.close()


def _spread(items: Sequence) -> beam.PTransform:
  """Hands items to the workers in turn. Give the largest first."""
  return "number" >> beam.Create(list(enumerate(items)), reshuffle=False) | "hand out" >> beam.GroupByKey()


def _run(build: Callable[[beam.Pipeline], Any], runner: Runner, folder: Path) -> None:
  (folder / MISTAKE).unlink(missing_ok=True)
  try:
    with beam.Pipeline(options=runner.beam_options()) as pipeline:
      build(pipeline)
  except Exception as error:
    if (folder / MISTAKE).is_file():
      raise BadInput(json.loads((folder / MISTAKE).read_text())) from error
    raise


def each(label: str, items: Sequence, work: Work, folder: Path, runner: Runner) -> None:
  """Does the work for every item; results are dropped. Give the largest items first."""
  _run(lambda pipeline: pipeline | f"{label} of" >> _spread(items) | label >> beam.ParDo(_InChild(work, folder)),
       runner, folder)


def pairs(label: str, items: Sequence, bands: Work, compare: Work, folder: Path, runner: Runner) -> list[list[str]]:
  """Pairs of copies among what all items hold, sorted.

  bands: yields (key, [place, id]) of what an item holds; what shares a key may be copies. compare: is given ((place,
  place), [[id, id], ...]) and yields those [id, id] that are.
  """
  found = folder / "pairs"
  shutil.rmtree(found, ignore_errors=True)

  def build(pipeline: beam.Pipeline) -> Any:
    keyed = pipeline | f"{label} of" >> _spread(items) | label >> beam.ParDo(_InChild(bands, folder))
    maybe = keyed | "share a key" >> beam.GroupByKey() | "neighbours" >> beam.FlatMap(neighbours)
    beside = maybe | "once" >> beam.Distinct() | "by place" >> beam.GroupByKey()
    same = beside | "one by one" >> beam.Map(lambda group: (0, [group])) | "compare" >> beam.ParDo(
      _InChild(compare, folder))
    return same | "as text" >> beam.Map(json.dumps) | "write" >> beam.io.WriteToText(str(found / "part"))

  _run(build, runner, folder)
  lines = [line for path in found.glob("part*") for line in path.read_text().splitlines()]
  return sorted(json.loads(line) for line in lines)


def neighbours(group: tuple[Any, Iterable[tuple[str, str]]]) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
  """Pairs to compare among those that share a key: ((place, place), (id, id)), in one order."""
  for (place, name), (other_place, other) in duplicates.pairs(tuple(member) for member in group[1]):
    yield (place, other_place), (name, other)
