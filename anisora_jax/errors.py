"""A user's mistake, told in one line.

Library code raises `BadInput`; entry points run under `run`, which prints the line and exits with status 2.
Anything else that escapes is a defect of ours and keeps its traceback.
"""

import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


class BadInput(ValueError):
  """Wrong input. The message is one line: what is wrong, what was got, what is allowed, what to do."""


def nearest(name: str, allowed: Iterable[str], otherwise: str = "") -> str:
  """Returns "did you mean ...?" for a misspelt name, or the allowed names when nothing is near, or `otherwise`."""
  allowed = sorted(allowed)
  close = get_close_matches(name, allowed, n=1)
  return f"did you mean {close[0]!r}?" if close else otherwise or f"allowed: {', '.join(allowed)}."


def pick(table: dict[str, T], name: str, what: str) -> T:
  """Looks a part up by its name in a table, or says which names there are."""
  if name not in table:
    raise BadInput(f"no {what} is named {name!r}: {nearest(name, table)}")
  return table[name]


def run(main: Callable[[], None], who: Callable[[], str] = str) -> int:
  """Runs an entry point; returns its exit status: 0, or 2 after one printed line if the input was wrong.

  who: what comes before the mistake, to tell one process from another.
  """
  try:
    main()
  except BadInput as mistake:
    print(f"error: {who()}{mistake}", file=sys.stderr)
    return 2
  return 0
