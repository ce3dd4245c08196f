"""A run goes on exactly where it stopped, stops when asked, and tells what it did."""

import itertools
import json
import math
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorboardX
import toy_run as toy
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from anisora_jax.checkpoints.orbax import Checkpoints
from anisora_jax.errors import BadInput
from anisora_jax.training import loop, report
from anisora_jax.training.stop import Stop

STEPS, DEVICES = 40, 2


@pytest.fixture
def start():
  """Starts a toy run beside this one; none outlives its test."""
  runs = []
  def begin(folder, steps=STEPS, seconds=0.0, devices=DEVICES, host=()) -> subprocess.Popen:
    arguments = map(str, (folder, steps, devices, seconds, *host))
    runs.append(subprocess.Popen([sys.executable, Path(__file__).with_name("toy_run.py"), *arguments],
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return runs[-1]
  yield begin
  for run in runs:
    run.kill()
    run.communicate()


def signal_after(step, runs, signals):
  """Sends each running trainer its signal once a step stands in its measures."""
  waiting = dict(signals)
  while waiting:
    time.sleep(0.01)
    for folder in list(waiting):
      path = folder / "measures.jsonl"
      assert runs[folder].poll() is None, runs[folder].stderr.read()
      if path.exists() and any(r["step"] >= step for r in report.read_measures(path)):
        runs[folder].send_signal(waiting.pop(folder))


def outcome(folder) -> tuple[list, list[bytes]]:
  """Of every step its loss and its records; and the bits of the last state."""
  steps = [(r["step"], r["loss"], r["records"]) for r in report.read_measures(folder / "measures.jsonl")]
  _, state, position = Checkpoints(folder / "checkpoints").restore(toy.abstract(toy.mesh_of(DEVICES)))
  return [*steps, position], [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def test_kill_and_terminate_at_any_time_then_the_same_to_the_bit(start, tmp_path):
  whole, killed, asked, early = folders = [tmp_path / name for name in ("whole", "killed", "asked", "early")]
  runs = {folder: start(folder, seconds=0.2) for folder in (killed, asked, early)}
  assert runs[early].stdout.readline() == "ready\n"  # before the step is compiled
  runs[early].send_signal(signal.SIGTERM)
  # Step 9 comes after the save of step 8 has begun, and that after the one of step 4 was finished.
  signal_after(9, runs, {killed: signal.SIGKILL, asked: signal.SIGTERM})
  runs[killed].wait()
  for folder, first, last in ((asked, 10, STEPS - 1), (early, 1, 2)):
    out, err = runs[folder].communicate(timeout=300)
    assert runs[folder].returncode == 0 and "SIGTERM: saves a checkpoint and stops" in err
    assert "stopped at " in out and first <= int(out.split()[-1]) <= last
    assert Checkpoints(folder / "checkpoints").steps()[-1] == int(out.split()[-1])
  assert 4 <= Checkpoints(killed / "checkpoints").steps()[-1] < STEPS

  for folder in folders:
    toy.train(folder, STEPS, DEVICES, 0.0)
  for folder in (killed, asked, early):
    assert outcome(folder) == outcome(whole)


def test_a_second_signal_ends_at_once_and_leaves_the_checkpoints_good(start, tmp_path):
  run = start(tmp_path, steps=1000, seconds=0.05)
  signal_after(9, {tmp_path: run}, {tmp_path: signal.SIGSTOP})  # so that both are there before it looks at either
  run.send_signal(signal.SIGTERM)
  run.send_signal(signal.SIGINT)
  os.kill(run.pid, signal.SIGCONT)
  _, err = run.communicate(timeout=300)
  assert run.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT) and "at once, without a checkpoint" in err
  assert Checkpoints(tmp_path / "checkpoints").restore(toy.abstract(toy.mesh_of(DEVICES)))[0] % 4 == 0


def test_two_hosts_stop_at_one_step_though_one_is_signalled(start, tmp_path):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  hosts = [start(tmp_path, steps=1000, seconds=0.05, devices=1, host=(rank, port)) for rank in (0, 1)]
  signal_after(5, {tmp_path: hosts[1]}, {tmp_path: signal.SIGTERM})
  outs = [host.communicate(timeout=300)[0] for host in hosts]
  assert [host.returncode for host in hosts] == [0, 0]
  assert outs[0].splitlines()[-1] == outs[1].splitlines()[-1] and "stopped at " in outs[0]
  # Restored by one host, bytes checked.
  step, _, position = Checkpoints(tmp_path / "checkpoints").restore(toy.abstract(toy.mesh_of(8)))
  assert outs[0].endswith(f"stopped at {step}\n") and position == {"global_next_index": step * toy.BATCH}


class Same(toy.Numbers):
  """A loader whose batches hold the same records."""

  def __init__(self, ids):
    super().__init__()
    self.ids = ids

  def __next__(self) -> dict:
    return {**super().__next__(), "id": self.ids}


class Recorder:
  """Effects that only write down what happened, in order."""

  def __init__(self):
    self.events = []

  def effects(self, **others) -> loop.Effects:
    return replace(loop.Effects(
      place=lambda batch: batch, work=lambda batch: (8, 100.0), ids=lambda batch: batch["id"],
      wait=lambda: self.events.append("wait"),
      held_out=lambda state: {"held_out": float(state.step)}, say=lambda line: self.events.append(line),
      save=lambda number, state, position: self.events.append(f"save {number} {position['global_next_index']}"),
      rate=lambda number: number / 10,
      report=lambda number, measures: self.events.append(f"report {number} {min(measures)}")), **others)

  def run(self, due, step, begun=0, stop=None, records=None, **effects):
    """records: of every batch."""
    numbers = toy.Numbers() if records is None else Same(records)
    numbers.position = {"global_next_index": begun * toy.BATCH}
    state = toy.state.TrainState(np.int32(begun), None, None, None)
    return loop.run(state, step, numbers, due, self.effects(**effects), stop or Stop(), report.Clock())


def counting(losses=lambda n: 1.0, dispatched=None):
  def step(state, batch):
    number = int(state.step) + 1
    if dispatched is not None:
      dispatched(number)
    loss = losses(number)
    return state.replace(step=np.int32(number)), {
      "loss": np.float32(loss), "skipped": np.int32(not math.isfinite(loss)), "stop": batch["stop"].max()}
  return step


def test_what_is_due_happens_once_and_in_order():
  recorder = Recorder()
  due = loop.Due(steps=7, report=2, held_out=3, checkpoint=2)
  _, number, stopped = recorder.run(due, counting(dispatched=lambda n: recorder.events.append(f"step {n}")))
  assert (number, stopped) == (7, False)
  said = [event.removesuffix(" checkpoint_seconds").removesuffix(" data_wait") for event in recorder.events]
  assert said == ["step 1", "step 2", "report 2", "save 2 16", "step 3", "report 3 held_out", "step 4", "report 4",
                  "save 4 32", "step 5", "step 6", "report 6", "report 6 held_out", "save 6 48", "step 7", "report 7",
                  "save 7 56", "wait"]


def test_the_learning_rate_of_a_step_is_reported_with_its_measures():
  recorder, told = Recorder(), {}
  recorder.run(loop.Due(steps=4, report=2), counting(), report=lambda number, measures: told.update({number: measures}))
  assert {number: measures["rate"] for number, measures in told.items()} == {2: 0.2, 4: 0.4}


def test_measures_are_fetched_while_the_next_step_is_under_way():
  recorder = Recorder()
  recorder.run(loop.Due(steps=4, report=1), counting(dispatched=lambda n: recorder.events.append(f"step {n}")))
  said = [event.split(" check")[0] for event in recorder.events]
  assert said == ["step 1", "step 2", "report 1", "step 3", "report 2", "step 4", "report 3", "report 4", "save 4 32",
                  "wait"]


def test_the_last_step_is_never_saved_twice_and_a_finished_run_does_nothing():
  for begun, expected in ((2, ["save 4 32", "wait"]), (4, ["wait"]), (9, ["wait"])):
    recorder = Recorder()
    recorder.run(loop.Due(steps=4, report=0, checkpoint=4), counting(), begun)
    assert [event for event in recorder.events if not event.startswith("report")] == expected


@pytest.mark.parametrize("at", [0, 1, 3, 4])
def test_a_wish_to_stop_is_a_save_and_an_end_within_two_steps(at):
  recorder, stop = Recorder(), Stop()
  stop.asked = at == 0
  def ask(number):
    stop.asked = stop.asked or number == at
  _, number, stopped = recorder.run(loop.Due(steps=100, report=0, checkpoint=4), counting(dispatched=ask), stop=stop)
  # The wish enters with the next batch, and is known when that step's measures are fetched.
  expected = {0: 2, 1: 3, 3: 4, 4: 6}[at]
  assert (number, stopped) == (expected, True)
  assert recorder.events[-2:] == [f"save {expected} {8 * expected}", "wait"]
  assert sum(event.startswith("save") for event in recorder.events) == 1 + (expected > 4)


def test_eight_bad_losses_in_a_row_end_the_run_and_seven_do_not():
  recorder = Recorder()
  def bad(number):
    return math.nan if 3 <= number < 10 or number >= 12 else 1.0
  with pytest.raises(BadInput, match=r"8 steps in a row \(12 to 19\) had a loss") as caught:
    recorder.run(loop.Due(steps=40, report=0), counting(bad))
  assert "\n" not in str(caught.value)
  said = [event for event in recorder.events if "left out" in event]
  assert len(said) == 7 + 8
  assert said[0] == ("step 3: loss nan, the update is left out; records: "
                     "16, 17, 18, 19, 20, 21, 22, 23 of source 0.")


@pytest.mark.parametrize("ids", [  # of this process, of another
  ([[7], [2**32 + 1]], [[2], [2**32 + 1]]),
  ([[5 * 2**48 + 7, 9 * 2**48 + 2], [-1, -1]], [[3 * 2**48 + 2**32 + 1, -1], [-1, -1]])], ids=["a row", "shared rows"])
def test_after_a_bad_loss_the_records_of_all_processes_are_named(ids):
  here, there = (np.array(one, np.int64) for one in ids)
  recorder = Recorder()
  recorder.run(loop.Due(steps=1, report=0), counting(lambda n: math.inf), records=here,
               ids=lambda batch: np.concatenate([batch["id"], there]))
  assert recorder.events[0] == "step 1: loss inf, the update is left out; records: 2, 7 of source 0; 1 of source 1."


def test_a_torn_last_line_is_not_read_and_what_follows_is_not_written_onto_it(tmp_path):
  path = tmp_path / "measures.jsonl"
  with report.Report(tmp_path, 0, 10) as measures:
    for step in range(1, 7):
      measures(step, {"loss": 1.0 * step, "attempt": 1})
    measures(4, {"held_out": 0.5})
  with path.open("a") as file:
    file.write('{"step": 7, "lo')
  assert [r["step"] for r in report.read_measures(path)] == [1, 2, 3, 4, 5, 6]
  with report.Report(tmp_path, 4, 10) as measures:
    measures(5, {"loss": math.nan, "attempt": 2})
  read = report.read_measures(path)
  # Step 6 of the first attempt is gone: the second has not come to it.
  assert [(r["step"], r["attempt"]) for r in read] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2)]
  assert read[3] == {"step": 4, "loss": 4.0, "attempt": 1, "held_out": 0.5} and math.isnan(read[4]["loss"])
  for line in path.read_text().splitlines():
    json.loads(line, parse_constant=pytest.fail)  # no NaN, which is no JSON
  for whole in range(len(path.read_bytes())):
    (tmp_path / "cut").write_bytes(path.read_bytes()[:whole])
    report.read_measures(tmp_path / "cut")


def test_a_spoilt_or_missing_file_of_measures_is_one_line(tmp_path):
  path = tmp_path / "measures.jsonl"
  with pytest.raises(BadInput, match="does not exist"):
    report.read_measures(path)
  path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
  with pytest.raises(BadInput, match="line 2 is not a record of a step"):
    report.read_measures(path)


def events(folder) -> list[event_pb2.Event]:
  """What TensorBoard would read of a folder's only event file."""
  (path,), found = folder.glob("events.out.tfevents.*"), []
  data = path.read_bytes()
  while data:
    length, = struct.unpack("<Q", data[:8])
    assert data[8:12] == struct.pack("<I", masked_crc32c(data[:8]))
    assert data[12 + length:16 + length] == struct.pack("<I", masked_crc32c(data[12:12 + length]))
    found.append(event_pb2.Event.FromString(data[12:12 + length]))
    data = data[16 + length:]
  return found


def test_the_board_reads_as_if_its_makers_had_written_it(tmp_path):
  with tensorboardX.SummaryWriter(str(tmp_path / "theirs"), purge_step=5) as theirs:
    theirs.add_scalar("loss", 0.25, 5)
  with report.Report(tmp_path / "ours", 4, 10) as ours:
    ours(5, {"loss": 0.25, "stop": 0})
  both = events(tmp_path / "theirs"), events(tmp_path / "ours" / "tensorboard")
  for event in itertools.chain(*both):
    event.wall_time = 0
  version, _, *rest = both[0]  # they tell the version once more
  assert both[1] == [version, *rest] and len(rest) == 2


def test_a_full_disk_costs_measures_and_not_the_run(tmp_path, capsys):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with report.Report(tmp_path, 0, 100, clock=lambda: 0.0) as measures:
    for step in range(1, 31):
      # The kernel refuses what goes beyond so many bytes, as it does on a full disk; from step 20 on it no longer does.
      resource.setrlimit(resource.RLIMIT_FSIZE, (200 if step < 20 else limits[0], limits[1]))
      measures(step, {"loss": 1.0 * step})
  kept = [r["step"] for r in report.read_measures(tmp_path / "measures.jsonl")]
  shown = [event.step for event in events(tmp_path / "tensorboard")][2:]
  for steps in (kept, shown):
    assert steps[0] == 1 and steps[-11:] == list(range(20, 31)) and 11 < len(steps) < 25
  said = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
  assert len(said) == 2


def test_only_the_first_host_writes(tmp_path):
  with report.Report(tmp_path / "run", 0, 10, leads=False) as measures:
    measures(1, {"loss": 1.0})
    measures.say("hello")
  assert not (tmp_path / "run").exists()


def test_lines_come_now_and_then_with_the_time_left_where_there_is_no_bar(tmp_path, capsys):
  now = 0.0
  with report.Report(tmp_path, 0, 100, clock=lambda: now) as measures:
    for step in range(1, 101):
      measures(step, {"loss": step / 8})
      now += 60.0 if step == 50 else 1.0  # a checkpoint, say: it counts
  lines = capsys.readouterr().err.splitlines()
  left = {1: "", 11: ", 01:29 left", 21: ", 01:19 left", 31: ", 01:09 left", 41: ", 00:59 left", 51: ", 01:46 left",
          61: ", 01:17 left", 71: ", 00:53 left", 81: ", 00:33 left", 91: ", 00:14 left", 100: ""}
  assert lines == [f"step {n}/100: loss {n / 8:.4g}{text}" for n, text in left.items()]


def test_every_held_out_loss_has_its_line_where_there_is_no_bar(tmp_path, capsys):
  with report.Report(tmp_path, 0, 100, clock=lambda: 0.0) as measures:
    for step in (10, 20, 30):
      measures(step, {"loss": 1.0})
      measures(step, {"held_out": 0.5, "held_out/t 0.1": 0.25})
  lines = capsys.readouterr().err.splitlines()
  assert [line.removesuffix(", 00:00 left") for line in lines if "held_out" in line] == [
    f"step {n}/100: held_out 0.5, held_out/t 0.1 0.25" for n in (10, 20, 30)]
  assert [line for line in lines if "loss" in line] == ["step 10/100: loss 1"]


def test_each_record_that_is_left_out_is_said_once_and_of_a_heap_only_how_many():
  lines, bad = [], [("a record 1", "torn"), ("a record 1", "torn")]
  left_out = report.LeftOut(lines.append, "train")
  left_out(bad)
  assert lines == ["left out of train: a record 1: torn"] and bad == []  # or it would grow for as long as a run goes
  left_out([("a record 1", "torn"), ("b record 1", "short")])
  assert lines[1:] == ["left out of train: b record 1: short"]
  left_out([(f"c record {n}", "torn") for n in range(100)])
  assert len(lines) == 34
  assert lines[-2:] == [f"left out of train: {n} records by now, no longer named." for n in (33, 65)]


def test_speed_is_that_of_the_median_step():
  clock = report.Clock(window=4, peak=1000.0)
  for seconds in (9.0, 9.0, 1.0, 2.0, 30.0, 2.0):
    clock.step(seconds, seconds / 10, tokens=10, flops=400.0)
  clock.saved(0.5)
  assert clock.rates() == pytest.approx({"step_seconds": 2.0, "data_wait": 0.1, "checkpoint_seconds": 0.5,
                                         "tokens_per_second": 5.0, "flops_per_second": 200.0, "mfu": 0.2})
  assert clock.rates()["checkpoint_seconds"] == 0.0
  unknown = report.Clock()
  unknown.step(1.0, 0.0)
  assert set(unknown.rates()) == {"step_seconds", "data_wait", "checkpoint_seconds"}


@pytest.mark.parametrize("kind, flops", [
  ("NVIDIA H100 80GB HBM3", 9.89e14), ("NVIDIA H100 PCIe", 7.56e14), ("NVIDIA H200", 9.89e14),
  ("NVIDIA A100-SXM4-40GB", 3.12e14), ("TPU v5 lite", 1.97e14), ("TPU v5p", 4.59e14), ("TPU v5", 4.59e14),
  ("TPU v6 lite", 9.18e14), ("cpu", None), ("NVIDIA GeForce RTX 4090", None)])
def test_the_peak_is_known_or_not_told(kind, flops):
  assert report.peak(kind) == flops


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 5, "report": -1}, {"steps": 5, "checkpoint": -2},
                                   {"steps": 5, "held_out_batches": 0}])
def test_nonsense_intervals_are_refused(wrong):
  with pytest.raises(BadInput, match="it must be"):
    loop.Due(**wrong)


def test_signals_are_given_back():
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with Stop() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    while not stop.asked:
      time.sleep(0.001)
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
