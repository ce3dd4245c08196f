"""Two processes of four devices do what one of eight does, to the bit; and none waits for ever, or leaves unheard."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from drawn import FEW, packed

from anisora_jax import entry
from anisora_jax.errors import BadInput
from anisora_jax.parallel import processes

ROOT = Path(__file__).resolve().parents[1]
STEPS, STOPPED = 8, 75
TRAIN = ("train", "--config=configs/tiny.py", "--config.data.buckets=5x16x24@8", f"--config.train.steps={STEPS}",
         "--config.train.report=1", "--config.train.checkpoint=0", "--config.train.held_out=0",
         "--config.optimizer.warmup=2", "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.seq=2",
         f"--stopped_status={STOPPED}", *FEW)
ENCODE = ("encode", "--config=configs/tiny.py", "--config.data.buckets=5x16x24@8,9x16x24@8")


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
  return packed(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
  """Of a machine that no scheduler knows; what is compiled is compiled once."""
  known = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "JAX_"))}
  return {**known, "JAX_PLATFORMS": "cpu",
          "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def free_port(choices=(0,)) -> int:
  """One of these ports that nobody listens at; 0 is any."""
  for port in choices:
    with socket.socket() as probe:
      try:
        probe.bind(("localhost", port))
      except OSError:
        continue
      return probe.getsockname()[1]
  raise OSError("no port is free")


@pytest.fixture(scope="module")
def start(environment):
  """Starts entry points as users do; none outlives the tests."""
  begun = []

  def command(name: str, *words: str) -> subprocess.Popen:
    begun.append(subprocess.Popen([sys.executable, "-m", f"anisora_jax.{name}", *words], cwd=ROOT, env=environment,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return begun[-1]

  yield command
  for process in begun:
    process.kill()
    process.communicate()


def pair(start, *words: str, others: tuple = ()) -> list[subprocess.Popen]:
  """The same command in two processes of four devices. others: words of the second alone."""
  port = free_port()
  return [start(*words, "--cpu_devices=4", f"--coordinator=localhost:{port}", "--processes=2", f"--process={k}",
                *(others if k else ())) for k in (0, 1)]


def ends(runs: list[subprocess.Popen], status: int = 0) -> list[tuple[list[str], list[str]]]:
  """The lines that each of them printed, on stdout and stderr, without those of the library between the machines."""
  said = [run.communicate(timeout=300) for run in runs]
  assert [run.returncode for run in runs] == [status] * len(runs), [err[-2000:] for _, err in said]
  return [tuple([line for line in text.splitlines() if "[Gloo]" not in line] for text in one) for one in said]


def steps(folder: Path) -> dict[int, dict]:
  rows = [json.loads(line) for line in (folder / "measures.jsonl").read_text().splitlines()]
  return {row["step"]: row for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def trained(start, records, tmp_path_factory) -> tuple[Path, Path]:
  """The run of one process, and that of two, which were stopped and went on."""
  one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
  data = f"--config.data.records={records}"
  ends([start(*TRAIN, data, f"--workdir={one}", "--cpu_devices=8")])
  runs = pair(start, *TRAIN, data, f"--workdir={two}")
  while not ((two / "measures.jsonl").exists() and steps(two)):
    assert runs[0].poll() is None, runs[0].communicate()[1]
    time.sleep(0.01)
  runs[1].send_signal(signal.SIGTERM)
  (told, _), (silent, warned) = ends(runs, STOPPED)
  assert "the same command goes on" in told[-1] and not silent
  assert len(warned) == 1 and warned[0].startswith("SIGTERM: saves a checkpoint")
  (told, _), (silent, quiet) = ends(pair(start, *TRAIN, data, f"--workdir={two}"))
  assert any(line.startswith("resumes after step") for line in told) and not silent and not quiet
  return one, two


def test_two_processes_stopped_by_one_signal_and_resumed_train_as_one_process_does(trained):
  one, two = (steps(folder) for folder in trained)
  assert list(one) == list(two) == list(range(1, STEPS + 1))
  assert [row["records"] for row in one.values()] == [row["records"] for row in two.values()]
  assert len({row["records"] for row in one.values()}) > 1
  # Measured: equal to the bit. Another order of the sums between devices may change the last bits.
  for name in ("loss", "grad_norm"):
    assert [row[name] for row in two.values()] == pytest.approx([row[name] for row in one.values()], rel=1e-6)


def test_processes_that_share_clips_train_as_one_process_does(trained, start, records, tmp_path):
  """Each holds a part of every clip, where one process held them otherwise: sums have another order."""
  shared = "--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.mesh.clip=2", "--config.mesh.seq=4"
  ends(pair(start, *TRAIN, *shared, f"--config.data.records={records}", f"--workdir={tmp_path}"))
  one, two = steps(trained[0]), steps(tmp_path)
  assert [row["records"] for row in one.values()] == [row["records"] for row in two.values()] and len(two) == STEPS
  assert [row["loss"] for row in two.values()] == pytest.approx([row["loss"] for row in one.values()], rel=1e-6)


MIXED = """
import sys
import numpy as np
from anisora_jax.parallel import mesh, processes, rows
mesh.simulate(2)
processes.join(processes.Meeting(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2])))
import jax
assert mesh.alike(2**32 - 1) and not mesh.alike(int(sys.argv[2]))
first, second, third, fourth = jax.devices()
for sizes in ({"fsdp": 4}, {"fsdp": 2, "seq": 2}):
  there = mesh.build(sizes, devices=[first, third, second, fourth])
  own, parts = mesh.held(there)
  whole = np.arange(8) * 2**40
  mine = whole.reshape(parts, -1)[own].ravel()
  assert (mesh.gather(there, mine) == whole).all()
  doubled = jax.jit(lambda x: 2 * x)
  assert (rows.through(there, doubled, {"x": mine[:-1].astype(np.float32)}) == 2 * mine[:-1]).all()
"""


def test_rows_come_to_their_places_where_the_devices_of_hosts_are_mixed(environment):
  port = free_port()
  ends([subprocess.Popen([sys.executable, "-c", MIXED, str(port), str(number)], cwd=ROOT, text=True, env=environment,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE) for number in (0, 1)])


def test_two_processes_make_the_film_that_one_makes(trained, start):
  folder = trained[1]
  words = ("sample", f"--workdir={folder}", "--held_out=1", "--tasks=first", "--show=1", "--steps=2")
  (told, _), (silent, quiet) = ends(pair(start, *words))
  assert told[-1] == f"look at {folder}/samples/report.html" and not silent and not quiet
  film, scores = (folder / "samples" / "first-0.mp4").read_bytes(), json.loads(
    (folder / "samples" / "scores.json").read_text())
  ends([start(*words, "--cpu_devices=8")])
  assert (folder / "samples" / "first-0.mp4").read_bytes() == film
  assert json.loads((folder / "samples" / "scores.json").read_text()) == scores


def test_two_processes_encode_the_bytes_that_one_writes(start, records, tmp_path):
  data = f"--config.data.records={records}"
  (told, _), (silent, quiet) = ends(pair(start, *ENCODE, data, f"--out={tmp_path / 'two'}"))
  ends([start(*ENCODE, data, f"--out={tmp_path / 'one'}", "--cpu_devices=8")])
  one, two = ({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("one", "two"))
  assert sum(name.endswith(".arrayrecord") for name in one) == 4 and one == two
  assert "are latents in" in told[-1] and not silent and not quiet
  (told, _), _ = ends(pair(start, *ENCODE, data, f"--out={tmp_path / 'two'}"))
  assert told[-1].endswith("is complete already")


def test_a_mistake_of_all_is_one_line_of_each(start, tmp_path):
  lines = ends(pair(start, *TRAIN, "--config.data.records=/nowhere", f"--workdir={tmp_path}"), status=2)
  for number, (silent, warned) in enumerate(lines):
    assert not silent and len(warned) == 1
    assert warned[0].startswith(f"error: process {number} of 2: no records in /nowhere")


def test_a_mistake_of_one_ends_the_others_soon(start, records, tmp_path):
  began = time.time()
  runs = pair(start, *TRAIN, f"--config.data.records={records}", f"--workdir={tmp_path}",
              others=("--config.data.records=/nowhere",))
  (_, warned), (_, wrong) = [run.communicate(timeout=300) for run in runs]
  assert runs[1].returncode == 2 and wrong.startswith("error: process 1 of 2: no records in /nowhere")
  assert runs[0].returncode not in (0, 2) and "another" in warned
  assert time.time() - began < 120


FULL = """
import sys
import jax
from anisora_jax import entry
entry.run(lambda: jax.numpy.ones(%s, jax.numpy.uint8), "", "", smaller="take less")
"""


def run_full(environment, shape: str, *words: str) -> subprocess.Popen:
  return subprocess.Popen([sys.executable, "-c", FULL % shape, *words], cwd=ROOT, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_too_little_memory_is_one_line_of_each_and_says_what_to_do(environment):
  words = [f"--coordinator=localhost:{free_port()}", "--processes=2"]
  runs = [run_full(environment, "2**46", *words, f"--process={k}") for k in (0, 1)]
  for name, (_, warned) in zip(("", "process 0 of 2: ", "process 1 of 2: "),
                               ends([run_full(environment, "2**46"), *runs], status=2), strict=True):
    said = f"a device has too little memory (Out of memory allocating {2**46} bytes): take less."
    assert warned == [f"error: {name}{said}"]


@pytest.mark.parametrize("text, said", [
  ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9.00GiB.", "9.00GiB): less."),
  ("INTERNAL: a step: RESOURCE_EXHAUSTED: Failed to allocate request for 9.0GiB\nLargest: x", "Largest: x): less."),
  ("RESOURCE_EXHAUSTED: Attempting to reserve 9G at the bottom of memory. That was not possible.", "possible): less."),
  ("RESOURCE_EXHAUSTED: Received message larger than max (9 vs. 4)", None), ("INTERNAL: out of memory", None)])
def test_devices_without_memory_are_told_from_other_failures(text, said):
  error = jax.errors.JaxRuntimeError(text)
  if said is None:
    with pytest.raises(jax.errors.JaxRuntimeError):
      entry._too_large(error, "less")
  else:
    line = str(entry._too_large(error, "less"))
    assert said in line and "\n" not in line


def test_another_error_of_the_device_keeps_its_traceback(environment):
  (_, warned), = ends([run_full(environment, "jax.pure_callback(lambda: 1 / 0, jax.ShapeDtypeStruct((), 'int32'))")],
                      status=1)
  assert any("ZeroDivisionError" in line for line in warned) and "Traceback (most recent call last):" in warned


JOIN = """
import os, sys
from anisora_jax.parallel import mesh, processes
mesh.simulate(2)
processes.join(%s, patience=%s)
import jax
print(processes.name(), len(jax.devices()), len(jax.local_devices()), file=sys.stderr)
"""


def joining(environment, meeting=None, patience=60.0, **variables) -> subprocess.Popen:
  return subprocess.Popen([sys.executable, "-c", JOIN % (meeting, patience)], cwd=ROOT, text=True,
                          env={**environment, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def slurm(number: int, port: int) -> dict[str, str]:
  # JAX makes the port of the job's number.
  return {"SLURM_JOB_ID": str(port - 61440), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
          "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": str(number), "SLURM_LOCALID": "0"}


def open_mpi(number: int, port: int) -> dict[str, str]:
  return {"OMPI_MCA_orte_hnp_uri": f"{(port - 61440) * 4096}.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2",
          "OMPI_COMM_WORLD_RANK": str(number), "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
          "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


def variables(number: int, port: int) -> dict[str, str]:
  return dict(zip(("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
                  (f"localhost:{port}", "2", str(number)), strict=True))


@pytest.mark.parametrize("launcher", [slurm, open_mpi])
def test_processes_of_a_launcher_find_each_other(launcher, environment):
  port = free_port(range(61440 + os.getpid() % 4000, 65536))
  runs = [joining(environment, **launcher(number, port)) for number in (0, 1)]
  for number, (_, (*_, last)) in enumerate(ends(runs)):
    assert last == f"process {number} of 2:  4 2"


@pytest.fixture
def parsed():
  flags.FLAGS(["train"])
  yield
  flags.FLAGS.unparse_flags()


def test_variables_say_what_flags_say(parsed, monkeypatch):
  for name, value in variables(1, 5000).items():
    monkeypatch.setenv(name, value)
  assert entry._meeting() == processes.Meeting("localhost:5000", 2, 1)
  with flagsaver.flagsaver(coordinator="node-0:7", processes=4, process=3):
    assert entry._meeting() == processes.Meeting("node-0:7", 4, 3)
  monkeypatch.setenv("JAX_PROCESS_ID", "first")
  with pytest.raises(BadInput, match="JAX_PROCESS_ID=first must be whole"):
    entry._meeting()
  monkeypatch.delenv("JAX_PROCESS_ID")
  assert entry._meeting() is None  # JAX may know the rest


@pytest.mark.parametrize("environ", [
  {}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
  # srun --pty in an allocation for four.
  {**slurm(0, 61441), "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}],
  ids=["a machine", "a batch script", "a shell in an allocation", "a pod"])
def test_a_process_that_was_started_alone_stays_alone_at_once(environ, environment):
  run = joining(environment, patience=20.0, **environ)
  assert ends([run])[0][1] == [" 2 2"]


def test_who_waits_says_so_and_gives_up(environment):
  for number in (0, 1):
    port = free_port()
    run = joining(environment, f"processes.Meeting('localhost:{port}', 2, {number})", patience=4.0)
    (_, warned), = ends([run], status=2)
    assert warned[0].startswith(f"process {number} of 2 waits for the others at localhost:{port}, up to 4 s")
    assert warned[-1].startswith(f"error: process {number} of 2 waited 4 s") and len(warned) == 2


@pytest.mark.parametrize("environ", [{"OMPI_COMM_WORLD_SIZE": "2"}, {"PMI_SIZE": "2"}, {
  "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}], ids=["Open MPI 5", "MPICH", "a job's pod"])
def test_one_of_many_that_cannot_find_the_others_is_told_so(environ, environment):
  (_, warned), = ends([joining(environment, **environ)], status=1)
  assert warned[-1].startswith("anisora_jax.errors.BadInput: this process cannot join the others")
  assert "--coordinator HOST:PORT" in warned[-1] and "--distributed=off" in warned[-1]


@pytest.mark.parametrize("environ, told", [
  (slurm(0, 61441), {"num_processes": 2, "local_device_ids": []}),
  ({**slurm(0, 61441), "JAX_LOCAL_DEVICE_IDS": "0,1"}, {"num_processes": 2}),
  ({**slurm(0, 61441), "SLURM_STEP_NUM_NODES": "1"}, {"num_processes": 2}),
  ({**open_mpi(0, 61441), "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, {"num_processes": 2, "local_device_ids": []}),
  ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "TPU_WORKER_HOSTNAMES": "a,b"}, {})])
def test_a_process_for_each_machine_sees_all_its_devices(environ, told):
  assert processes.detected(environ) == told


@pytest.mark.parametrize("meeting, said", [
  (("localhost", 2, 0), "'localhost' is not HOST:PORT"), ((":123", 2, 0), "is not HOST:PORT"),
  (("a:1", 2, 2), "process 2 of 2: processes count from 0 to 1")])
def test_impossible_meetings_are_refused(meeting, said):
  with pytest.raises(BadInput, match=said):
    processes.Meeting(*meeting)


@pytest.mark.parametrize("given, many, said", [
  ({"process": 0, "processes": 2}, True, "no --coordinator was given: --coordinator, --processes and --process belong"),
  ({"process": 0, "distributed": "off"}, True, "--process was given to what runs alone: leave it out, or"),
  ({"coordinator": "a:1", "processes": 2, "process": 0}, False, "was given to what runs alone: leave it out.")],
  ids=["a part", "and off", "convert"])
def test_flags_that_contradict_each_other_are_refused(given, many, said, parsed):
  with flagsaver.flagsaver(**given), pytest.raises(BadInput, match=said):
    entry._join(many)
