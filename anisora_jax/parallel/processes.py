"""Processes, one on each machine, become one program: how they meet, what each is called, and how one leaves early.

Three things of jax.distributed are not obvious. Its preemption service would take SIGTERM, which belongs to
training/stop.py. A launcher that starts one process for each machine would have it see one GPU, because JAX expects one
process for each. And what goes wrong while processes meet ends them in C++ with a page of stack, so we give up first.
"""

import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from anisora_jax.errors import BadInput

# Set by a launcher for each process that it starts: how many it started together.
COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
POD, JOB = "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"  # set in every pod; in the pods of an indexed job
SLICE = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")     # set in the pods of a TPU slice
DEVICES = "JAX_LOCAL_DEVICE_IDS"                              # a user's own choice for this process
QUIET = 10.0   # seconds after which a process says that it waits
PATIENCE = 300.0  # seconds after which it gives up; a cluster's machines do not start in the same minute
SEEN = 60.0    # seconds in which what one machine writes must be seen by the others
GRACE = 10.0   # seconds that a process which fails gives the others to fail alike


@dataclass(frozen=True)
class Meeting:
  """Where processes meet: HOST:PORT of the first, how many they are, and which of them this is."""

  coordinator: str
  count: int
  number: int

  def __post_init__(self):
    host, _, port = self.coordinator.rpartition(":")
    if not host or not port.isdecimal():
      raise BadInput(f"coordinator {self.coordinator!r} is not HOST:PORT: give the first process's, as node-0:1234.")
    if not 0 <= self.number < self.count:
      raise BadInput(f"process {self.number} of {self.count}: processes count from 0 to {self.count - 1}.")


def detected(environ: Mapping[str, str]) -> dict | None:
  """What to tell jax.distributed of a launcher's processes, the rest of which it finds itself; None for a process that
  was started alone."""
  counts = [int(environ[name]) for name in COUNTS if environ.get(name, "").isdecimal()]
  if counts and max(counts) == 1:  # a shell inside a larger allocation: JAX would wait for processes nobody started
    return None
  if not counts:
    pod_alone = POD in environ and JOB not in environ and not any(name in environ for name in SLICE)
    return None if pod_alone else {}
  nodes, here = environ.get("SLURM_STEP_NUM_NODES"), environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
  one_a_node = nodes == str(max(counts)) or here == "1"
  # An empty list is no restriction; None would be "the device of this process's number on its machine".
  return {"num_processes": max(counts), **({"local_device_ids": []} if one_a_node and DEVICES not in environ else {})}


def join(meeting: Meeting | None = None, environ: Mapping[str, str] = os.environ, patience: float = PATIENCE) -> None:
  """Makes this process one of those that were started with it; called before the first use of a device.

  meeting: where; None asks what JAX knows of: SLURM's srun, Open MPI 4's mpirun, a TPU slice, a Kubernetes job. A
  process that nothing says to be one of many stays alone. Raises BadInput, or says so and exits with status 2, where
  one that is of many does not find the others.
  """
  if meeting:
    found = None if meeting.count == 1 else {
      "coordinator_address": meeting.coordinator, "num_processes": meeting.count, "process_id": meeting.number,
      "cluster_detection_method": "deactivate"}
  else:
    found = detected(environ)
  if found is None:
    return
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.config.update("jax_enable_preemption_service", False)
  many = bool(found) or JOB in environ
  watch = _Watch(meeting, patience)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # JAX's advice to install what finds Kubernetes' jobs; ours is below
      jax.distributed.initialize(**found, initialization_timeout=int(patience) + 60)
  except (ValueError, RuntimeError) as error:
    # JAX says by this that it knows no launcher that could have started this process.
    if "coordinator_address" not in str(error) or many:
      by_package = " install the package kubernetes, through which JAX finds a job's pods; or" if JOB in environ else ""
      raise BadInput(f"this process cannot join the others ({' '.join(str(error).split())[:200]}):{by_package} give "
                     "--coordinator HOST:PORT --processes N --process K, or --distributed=off to run alone.") from None
  finally:
    watch.end()
  if jax.distributed.is_initialized() and jax.process_index() != 0:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # one process tells for all


class _Watch:
  """Says that a process waits for the others, and ends it when it has waited too long."""

  def __init__(self, meeting: Meeting | None, patience: float):
    self.who = f"process {meeting.number} of {meeting.count}" if meeting else "this process"
    self.where = f" at {meeting.coordinator}" if meeting else ""
    self.patience = patience
    self.timers = [threading.Timer(min(QUIET, patience / 2), self._tell), threading.Timer(patience, self._give_up)]
    for timer in self.timers:
      timer.daemon = True
      timer.start()

  def _tell(self) -> None:
    print(f"{self.who} waits for the others{self.where}, up to {self.patience:.0f} s; --distributed=off runs alone.",
          file=sys.stderr, flush=True)

  def _give_up(self) -> None:
    print(f"error: {self.who} waited {self.patience:.0f} s{self.where} and not all others came: see that each runs and "
          "can reach that host and port, or give --distributed=off to run alone.", file=sys.stderr, flush=True)
    os._exit(2)

  def end(self) -> None:
    for timer in self.timers:
      timer.cancel()


def name() -> str:
  """"process 1 of 4: " for what one of many says, "" for a process that is alone."""
  return f"process {jax.process_index()} of {jax.process_count()}: " if jax.distributed.is_initialized() else ""


def leave(status: int) -> None:
  """Ends this process, one of many, after an error; alone, does nothing.

  The usual exit would wait minutes for the others, which wait for this one; they end when its connections do.
  """
  if not jax.distributed.is_initialized():
    return
  sys.stderr.flush()
  parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  parting.start()
  parting.join(GRACE)
  os._exit(status)


def appeared(paths: Iterable[Path], patience: float = math.inf) -> bool:
  """Waits until other processes have written these files; False once `patience` seconds are over.

  No barrier: those of the devices have time limits, and another process may have hours of clips more than this one.
  It does not wait for the dead: when a process ends before its time, JAX ends the others.
  """
  end = time.monotonic() + patience
  for path in paths:
    while not path.exists():
      if time.monotonic() > end:
        return False
      time.sleep(0.2)
  return True
