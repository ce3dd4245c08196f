"""What a compiled program sends between devices, read from its text: HLO of one device, loops multiplied out.

A collective of g devices on b bytes (of its whole result; of its operand for a reduce-scatter) makes each device send,
by the ring algorithms, all-gather, reduce-scatter and all-to-all b (g - 1) / g; all-reduce twice that;
collective-permute b. From: Thakur et al. 2005, doi:10.1177/1094342005051521.

Bytes are not time. Among all devices of a 3D torus of TPUs with no side below 4, XLA writes all-gathers as all-reduces
of shards in zeros: twice the bytes, yet by three or six rings at once ("colors:6"), where its all-gather is one ring
("1D"). Reduce-scatters among all devices, of other tori too, may likewise be all-reduces of which a part is kept.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "bf16": 2} | {f"{kind}{8 * size}": size for kind in "suf" for size in (1, 2, 4, 8)}
WORK = r"tpu_custom_call|__cudnn|__cublas| (?:dot|convolution)\("
CALLS = r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"


class Sent(NamedTuple):
  """How often a step starts collectives of a kind, and the bytes that one device sends for them."""

  count: int
  bytes: float


def _sizes(text: str) -> list[int]:
  """Bytes of each array of a type."""
  return [BYTES.get(kind, 0) * math.prod(int(dim) for dim in dims.split(",") if dim)
          for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", text)]


def _group(line: str) -> int:
  """Devices that take part in one collective, in any of the ways in which XLA writes it."""
  if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    return found[1].count(",") + 1
  if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
    return int(found[1])
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])  # a part of an axis is written 'a':(1)2
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  raise ValueError(f"no groups of devices in {line[:300]}")


def _sends(line: str) -> tuple[str, float] | None:
  """(kind, bytes a device sends) of an instruction, or None where it is no collective."""
  found = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
  if not found:
    return None
  kind, sizes = found[2], _sizes(found[1])
  if kind == "collective-permute":
    if found[3]:  # its type lists what goes in, and then what comes out
      sizes = sizes[:line[found.end():].partition(")")[0].count("%")]
    return kind, float(sum(sizes))
  g, size = _group(line), float(sum(sizes))
  if kind == "reduce-scatter":
    size *= g  # the type is that of what is left
  if found[3] and kind != "all-reduce":  # the type of a start lists what goes in, and then what comes out
    size *= {"all-gather": g / (g + 1), "reduce-scatter": 1 / (g + 1), "all-to-all": 1 / 2}[kind]
  return kind, (2 if kind == "all-reduce" else 1) * size * (g - 1) / g


def _starts(line: str, lines: Sequence[str]) -> bool:
  """Whether a collective starts with an instruction of a computation, and does not merely go on.

  A TPU that is told to send while its matrix products work writes one collective, of one chain_id, in each of them.
  """
  name = line.split(" = ")[0].split()[-1]
  return "chain_id=" not in line or any("AsyncCollectiveStart" in other and f"({name})" in other for other in lines)


def _parts(text: str) -> tuple[dict[str, list[str]], str]:
  """(lines of each computation, name of the one that is run)."""
  parts, name, entry = {}, None, None
  for line in text.splitlines():
    if found := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
      name = found[2]
      parts[name], entry = [], name if found[1] else entry
    elif name:
      parts[name].append(line)
  return parts, entry


def _turns(line: str, condition: list[str]) -> int:
  """How often a loop turns: as XLA notes it, or the bound that its counter is compared with."""
  if found := re.search(r'known_trip_count[^0-9]*(\d+)', line):
    return int(found[1])
  bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
  return max(map(int, bounds), default=1)


def _called(line: str, parts: Mapping[str, list[str]]) -> list[tuple[str, int]]:
  """(computation, how often) that an instruction runs. Of branches all count."""
  if found := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
    return [(found[2], _turns(line, parts[found[1]]))]
  if re.search(r"-(done|update)\(", line):  # told by what it started with
    return []
  names = re.findall(CALLS, line)
  if found := re.search(r"branch_computations=\{([^}]*)\}", line):
    names += [name.strip().lstrip("%") for name in found[1].split(",")]
  return [(name, 1) for name in names]


def sent(text: str) -> dict[str, Sent]:
  """What a step sends, by kind of collective; text: of a compiled program.

  A TPU writes a reduce-scatter as an all-reduce in a computation that bears its name and keeps a part of the result.
  """
  parts, entry = _parts(text)
  known: dict[str, Counter] = {}

  def total(name: str) -> Counter:
    if name in known:
      return known[name]
    known[name] = found = Counter()
    lines = parts.get(name, ())
    for line in lines:
      if (one := _sends(line)) and _starts(line, lines):
        kind, size = one
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
          kind, size = "reduce-scatter", size / 2
        found[kind, "count"] += 1
        found[kind, "bytes"] += size
      for inner, times in _called(line, parts):
        for key, value in total(inner).items():
          found[key] += times * value
    return found

  found = total(entry)
  return {kind: Sent(found[kind, "count"], found[kind, "bytes"]) for kind in KINDS if found[kind, "count"]}


def hidden(text: str) -> tuple[int, int]:
  """(transfers to a neighbour that hide behind work, all transfers) in the schedule of a compiled program.

  Work is a kernel or a matrix product that stands between a transfer's start and its end; loops count once.
  """
  parts, _ = _parts(text)

  def works(line: str) -> bool:
    return bool(re.search(WORK, line)) or any(any(map(works, parts.get(name, ()))) for name, _ in _called(line, parts))

  found = []
  for lines in parts.values():
    for at, line in enumerate(lines):
      if start := re.search(r"%(\S+) = .* collective-permute-start\(", line):
        end = next((k for k in range(at, len(lines)) if f"collective-permute-done(%{start[1]})" in lines[k]), at)
        found.append(any(map(works, lines[at + 1:end])))
  return sum(found), len(found)


def describe(sent: Mapping[str, Sent], hidden: tuple[int, int] = (0, 0)) -> str:
  """One line for people: "all-gather 24 x, 1.5 MiB; reduce-scatter 8 x, 0.5 MiB: 2.0 MiB a device and step"."""
  parts = "; ".join(f"{kind} {one.count} x, {one.bytes / 2**20:,.1f} MiB" for kind, one in sent.items())
  line = f"{parts or 'nothing'}: {sum(one.bytes for one in sent.values()) / 2**20:,.1f} MiB a device and step"
  return line + (f"; {hidden[0]} of {hidden[1]} permutes hide behind a kernel" if hidden[1] else "")
