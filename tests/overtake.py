"""Which collectives of a compiled program stand beside a loop with collectives: neither waits for the other."""

import re

COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?\(")
LINE = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)")
NAME = re.compile(r"%([\w.\-]+)")


def _computations(hlo: str) -> dict[str, dict[str, str]]:
  """{computation: {instruction: what it is and which names it reads}}, in program order."""
  found: dict[str, dict[str, str]] = {}
  for line in hlo.splitlines():
    if line and not line[0].isspace() and line.endswith("{"):
      body = found.setdefault(NAME.search(line)[1] if "%" in line else "", {})
    elif match := LINE.match(line):
      body[match[1]] = match[2].split(", metadata=")[0]
  return found


def overtaking(hlo: str) -> list[tuple[str, str]]:
  """(loop, collective) pairs of a compiled module's text."""
  computations, pairs = _computations(hlo), []

  def talks(name: str) -> bool:
    return any(COLLECTIVE.search(text) or any(inner in computations and talks(inner) for inner in NAME.findall(text))
               for text in computations[name].values())

  for body in computations.values():
    above: dict[str, set[str]] = {}  # instruction -> all that it waits for
    for name, text in body.items():
      reads = [other for other in NAME.findall(text) if other in above]
      above[name] = set(reads).union(*(above[other] for other in reads))
    loops = [name for name, text in body.items() if re.search(r" (while|conditional|call)\(", text)
             and any(inner in computations and talks(inner) for inner in NAME.findall(text))]
    loud = loops + [name for name, text in body.items() if COLLECTIVE.search(text)]
    pairs += [(loop, name) for loop in loops for name in loud
              if name != loop and name not in above[loop] and loop not in above[name]]
  return pairs
