"""A progress bar of what workers finish, on this machine or others: it counts their files."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

SHARE = 20  # counting takes at most one part in so many of the time


@contextmanager
def bar(label: str, total: int, unit: str, count: Callable[[], int]) -> Iterator[None]:
  """Shows on stderr how many of `total` are done while the body runs. count: how many are done by now."""
  done = threading.Event()

  def watch() -> None:
    pause = .5
    while not done.wait(pause):
      start = time.perf_counter()
      shown.update(min(total, count()) - shown.n)
      pause = max(.5, SHARE * (time.perf_counter() - start))

  with tqdm(total=total, desc=label, unit=unit, mininterval=.5) as shown:
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
      yield
      shown.update(total - shown.n)
    finally:
      done.set()
      watcher.join()
