"""SIGTERM and SIGINT ask for a checkpoint and an end; a second one ends at once.

Entered before compilation, so that a signal is never lost. The signal is taken by a thread: a Python handler runs only
between two bytecodes of the main thread, which may be inside the compiler or waiting for the device for minutes.
With several hosts, switch JAX's own preemption service off (jax_enable_preemption_service) and enter this after
jax.distributed.initialize, which otherwise takes SIGTERM for itself.
"""

import os
import signal
import sys
import threading


class Stop:
  """`with Stop() as stop:` from the main thread; `stop.asked` turns True with the first signal."""

  SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    self.asked = False

  def __enter__(self) -> "Stop":
    self._read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    # The handlers do nothing but exist: without one, the default action would end the process.
    self._before = {number: signal.signal(number, lambda *_: None) for number in self.SIGNALS}
    self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
    threading.Thread(target=self._listen, args=(self._read,), daemon=True, name="signals").start()
    return self

  def __exit__(self, *_: object) -> None:
    signal.set_wakeup_fd(self._wakeup)
    for number, handler in self._before.items():
      signal.signal(number, handler)
    os.close(self._write)  # the thread reads the end of the pipe and goes

  def _listen(self, pipe: int) -> None:
    while numbers := os.read(pipe, 64):
      for number in numbers:
        if number in self.SIGNALS:
          self._take(number)
    os.close(pipe)

  def _take(self, number: int) -> None:
    name = signal.Signals(number).name
    if self.asked:
      print(f"{name} again: stops at once, without a checkpoint.", file=sys.stderr, flush=True)
      os._exit(128 + number)
    self.asked = True
    print(f"{name}: saves a checkpoint and stops after the running step; once more stops at once.",
          file=sys.stderr, flush=True)
