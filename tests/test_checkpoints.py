"""What was saved comes back bit for bit, or is known not to; a run's folder has one trainer and one config."""

import json
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_run as toy

from anisora_jax.checkpoints import manifest, orbax, workdir
from anisora_jax.checkpoints.orbax import Checkpoints
from anisora_jax.errors import BadInput
from anisora_jax.experiment import runs
from anisora_jax.parallel import offload

LOADER, CONFIG = {"global_next_index": 2**40 + 1}, {"model": {"sizes": [1, 2]}, "rate": 0.1}


@pytest.fixture(scope="module")
def states():
  """Three states of one run, kept as host copies: the devices' own are donated from step to step."""
  mesh = toy.mesh_of(8)
  numbers, now, kept = toy.Numbers(), toy.placed(mesh), []
  for _ in range(3):
    now, _ = toy.step(now, toy.place(mesh, next(numbers) | {"stop": np.zeros(toy.BATCH, np.int32)}))
    kept.append(jax.tree.map(lambda x: np.array(x), now))
  return kept


def on(mesh, kept):
  return jax.device_put(kept, toy.placements(kept, mesh))


def save(folder, states, *steps, keep=3, say=print):
  checkpoints = Checkpoints(folder, keep, say)
  for step in steps:
    checkpoints.save(step, on(toy.mesh_of(8), states[step % len(states)]), LOADER, CONFIG)
    checkpoints.wait()
  return checkpoints


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def files_of(folder: Path) -> list[Path]:
  return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("devices", [8, 4, 2])
def test_state_comes_back_bit_for_bit_on_any_mesh(tmp_path, states, devices):
  save(tmp_path, states, 4)
  mesh = toy.mesh_of(devices)
  step, state, loader = Checkpoints(tmp_path).restore(toy.abstract(mesh))
  assert (step, loader) == (4, LOADER)
  assert_same_bits(state, states[4 % 3])
  assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "bfloat16", "int32"}
  assert jax.tree.map(lambda x: x.sharding, state) == toy.placements(state, mesh)
  assert Checkpoints(tmp_path).config(4) == CONFIG


def test_a_save_holds_the_moment_it_was_asked_for(tmp_path, states):
  mesh, numbers = toy.mesh_of(8), toy.Numbers()
  now, checkpoints = on(mesh, states[0]), Checkpoints(tmp_path)
  expected = jax.tree.map(lambda x: np.array(x), now)
  checkpoints.save(1, now, LOADER, CONFIG)
  for _ in range(5):  # each donates the buffers of the one before
    now, _ = toy.step(now, toy.place(mesh, next(numbers) | {"stop": np.zeros(toy.BATCH, np.int32)}))
  checkpoints.wait()
  assert_same_bits(checkpoints.restore(toy.abstract(mesh))[1], expected)


def test_what_is_written_shares_no_memory_with_arrays_on_the_host(tmp_path, states, monkeypatch):
  """GPUs give no buffer away of which there is a view; a CPU copies it, and tells nothing."""
  mesh, given = toy.mesh_of(8), {}
  there = jax.tree.map(lambda x: x.with_memory_kind(offload.HOST), toy.placements(states[0].ema, mesh))
  now = on(mesh, states[0])
  now = now.replace(ema=jax.device_put(now.ema, there))
  save_async = orbax.ocp.save_checkpointables_async
  monkeypatch.setattr(orbax.ocp, "save_checkpointables_async",
                      lambda path, tree, **more: save_async(path, given.setdefault("tree", tree), **more))
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, now, LOADER, CONFIG)
  checkpoints.wait()
  for own, other in zip(jax.tree.leaves(now.ema), jax.tree.leaves(given["tree"]["state"].ema), strict=True):
    assert other.sharding.memory_kind == offload.HOST
    assert not any(np.shares_memory(np.asarray(one.data), np.asarray(two.data))
                   for one, two in zip(own.addressable_shards, other.addressable_shards, strict=True))
  assert_same_bits(checkpoints.restore(toy.abstract(mesh))[1], states[0])


def test_a_part_is_restored_where_the_rest_is_left_out(tmp_path, states):
  save(tmp_path, states, 4)
  abstract = toy.abstract(toy.mesh_of(4))
  for left_out in (jax.tree.map(lambda _: ..., abstract), toy.state.TrainState(..., ..., ..., ...)):
    _, state, _ = Checkpoints(tmp_path).restore(left_out.replace(ema=abstract.ema))
    assert_same_bits(state.ema, states[1].ema)
    assert state.step is ... and set(jax.tree.leaves((state.params, state.opt))) == {...}


def test_the_last_n_remain(tmp_path, states):
  checkpoints = save(tmp_path, states, 1, 2, 3, 4, keep=2)
  assert checkpoints.steps() == [3, 4]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4", "unfinished"]
  assert not any((tmp_path / "unfinished").iterdir())


def test_every_flipped_bit_is_seen_and_the_step_before_is_used(tmp_path, states):
  save(tmp_path, states, 4, 8)
  draw, abstract = random.Random(0), toy.abstract(toy.mesh_of(8))
  victims = [path for path in files_of(tmp_path / "8") if path.stat().st_size]
  assert len(victims) > 5
  for path in victims + draw.choices(victims, k=20):
    whole = path.read_bytes()
    spoilt = bytearray(whole)
    spoilt[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    path.write_bytes(spoilt)
    wrong = manifest.fault(tmp_path / "8", 8)
    assert wrong and (path.name == manifest.NAME or path.relative_to(tmp_path / "8").as_posix() in wrong)
    path.write_bytes(whole)
  assert manifest.fault(tmp_path / "8", 8) is None
  path = max(victims, key=lambda path: path.stat().st_size)
  path.write_bytes(bytes(spoilt := bytearray(path.read_bytes()))[:-1] + bytes([spoilt[-1] ^ 1]))
  said = []
  step, state, _ = Checkpoints(tmp_path, say=said.append).restore(abstract)
  assert step == 4 and len(said) == 1 and path.name in said[0] and "\n" not in said[0]
  assert_same_bits(state, states[1])


@pytest.mark.parametrize("harm, reason", [
  ("delete", "is missing"), ("truncate", "bytes and was written with"), ("empty", "is missing"),
  ("no manifest", "not a finished checkpoint"), ("moved", "is that of step 8"), ("newer format", "is of format 2")])
def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path, states, harm, reason):
  save(tmp_path, states, 4, 8)
  last = tmp_path / "8"
  data = max((path for path in files_of(last) if path.parent.name == "d"), key=lambda path: path.stat().st_size)
  if harm == "delete":
    data.unlink()
  elif harm == "truncate":
    data.write_bytes(data.read_bytes()[:-1])
  elif harm == "empty":
    shutil.rmtree(last / "state")
  elif harm == "no manifest":
    (last / manifest.NAME).unlink()
  elif harm == "moved":
    last.rename(tmp_path / "9")
  else:
    text = (last / manifest.NAME).read_text()
    (last / manifest.NAME).write_text(text.replace('"format":1', '"format":2'))
  said = []
  assert Checkpoints(tmp_path, say=said.append).restore(toy.abstract(toy.mesh_of(8)))[0] == 4
  assert len(said) == 1 and reason in said[0] and "\n" not in said[0]


def test_where_nothing_is_good_one_line_says_so(tmp_path, states):
  save(tmp_path, states, 4)
  (tmp_path / "4" / "_CHECKPOINT_METADATA").unlink()
  for folder in (tmp_path, tmp_path / "none"):
    with pytest.raises(BadInput, match="holds no good checkpoint") as caught:
      Checkpoints(folder, say=lambda _: None).restore(toy.abstract(toy.mesh_of(8)))
    assert "\n" not in str(caught.value)


def test_a_run_begins_afresh_only_where_no_checkpoint_was(tmp_path, states):
  assert Checkpoints(tmp_path / "none").last() == 0
  (tmp_path / "unfinished" / "4.orbax-checkpoint-tmp").mkdir(parents=True)  # a kill during the first save
  assert Checkpoints(tmp_path).last() == 0
  assert save(tmp_path, states, 4, 8).last() == 8
  (tmp_path / "8" / manifest.NAME).unlink()
  assert Checkpoints(tmp_path).last() == 4
  (tmp_path / "4" / manifest.NAME).unlink()
  with pytest.raises(BadInput, match=f"{tmp_path} holds numbered folders and no finished checkpoint") as caught:
    Checkpoints(tmp_path).last()
  assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again_and_never_outlives_a_good_one(tmp_path, states):
  save(tmp_path, states, 4, 6, 8)
  for step in (6, 8):
    (tmp_path / str(step) / "_CHECKPOINT_METADATA").write_bytes(b"")
  checkpoints = Checkpoints(tmp_path, keep=2, say=lambda _: None)
  assert checkpoints.restore(toy.abstract(toy.mesh_of(8)))[0] == 4
  for step, remain in ((7, [4, 7, 8]), (8, [7, 8])):
    checkpoints.save(step, on(toy.mesh_of(8), states[step % 3]), LOADER, CONFIG)
    checkpoints.wait()
    assert checkpoints.steps() == remain
  assert checkpoints.restore(toy.abstract(toy.mesh_of(8)))[0] == 8


def test_what_is_not_ours_is_neither_read_nor_deleted(tmp_path, states):
  elsewhere = tmp_path / "elsewhere"
  save(elsewhere, states, 5)
  folder = tmp_path / "checkpoints"
  for name in ("999999", "12.orbax-checkpoint-tmp", "notes", "007", "-1"):
    (folder / name).mkdir(parents=True)
    (folder / name / "file").write_text("mine")
  (folder / "77").symlink_to(elsewhere / "5")
  (folder / "88").write_text("a file")
  before = {path.name for path in folder.iterdir()}
  said = []
  checkpoints = save(folder, states, 1, 2, 3, keep=1, say=said.append)
  assert checkpoints.steps() == [3]
  assert {path.name for path in folder.iterdir()} == before | {"3", "unfinished"}
  assert checkpoints.restore(toy.abstract(toy.mesh_of(8)))[0] == 3
  assert len(said) == 1 and "999999" in said[0]
  checkpoints.save(999999, on(toy.mesh_of(8), states[0]), LOADER, CONFIG)
  with pytest.raises(BadInput, match="in the way and is not ours"):
    checkpoints.wait()
  assert (folder / "999999" / "file").read_text() == "mine" and (elsewhere / "5" / manifest.NAME).exists()


@pytest.mark.parametrize("change, said", [
  (lambda a: a.replace(params=a.params | {"bias": jax.ShapeDtypeStruct((8,), jnp.float32)}),
   "params/bias is float32[16] in the checkpoint and float32[8] in the model: use"),
  (lambda a: a.replace(params=a.params | {"bias": jax.ShapeDtypeStruct((16,), jnp.bfloat16)}),
   "params/bias is float32[16] in the checkpoint and bfloat16[16] in the model: use"),
  (lambda a: a.replace(params=a.params | {"gate": jax.ShapeDtypeStruct((1,), jnp.float32)}, opt=()),
   "params/gate is absent in the checkpoint and float32[1] in the model (and "),
  (lambda a: a.replace(params={k: v for k, v in a.params.items() if k != "bias"}),
   "params/bias is float32[16] in the checkpoint and absent in the model: use"),
  (lambda a: a.replace(params={"gate": ...}),
   "params/gate is absent in the checkpoint and not read in the model (and "),
])
def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path, states, change, said):
  save(tmp_path, states, 4)
  with pytest.raises(BadInput) as caught:
    Checkpoints(tmp_path).restore(change(toy.abstract(toy.mesh_of(8))))
  assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves callbacks behind
def test_a_save_that_the_disk_refuses_is_told_at_the_next_call_and_costs_no_other(tmp_path, states):
  said = []
  checkpoints = save(tmp_path, states, 4, say=said.append)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  # The kernel refuses every file beyond so many bytes, as it does on a full disk.
  resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
  try:
    checkpoints.save(8, on(toy.mesh_of(8), states[0]), LOADER, CONFIG)
    checkpoints._join()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert checkpoints.steps() == [4] and said == []
  checkpoints.save(12, on(toy.mesh_of(8), states[0]), LOADER, CONFIG)
  assert len(said) == 1 and "step 8 was not finished" in said[0] and "\n" not in said[0]
  checkpoints.wait()
  assert checkpoints.steps() == [4, 12]


def test_without_room_nothing_is_written_and_the_line_names_path_and_bytes(tmp_path, states, monkeypatch):
  said = []
  checkpoints = save(tmp_path, states, 4, say=said.append)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1234))
  checkpoints.save(8, on(toy.mesh_of(8), states[0]), LOADER, CONFIG)
  need = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(states[0])) + orbax.ROOM
  assert said == [f"the checkpoint of step 8 was not written: {tmp_path} has 1,234 bytes free and it needs up to "
                  f"{need:,}: free some space; earlier checkpoints are untouched."]
  checkpoints.save(12, on(toy.mesh_of(8), states[0]), LOADER, CONFIG)
  assert len(said) == 2 and "step 12" in said[1]  # each told once
  with pytest.raises(BadInput, match="step 12 was not written"):
    checkpoints.wait()
  checkpoints.wait()
  assert checkpoints.steps() == [4]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, states):
  (tmp_path / "file").write_text("")
  checkpoints = Checkpoints(tmp_path / "file" / "checkpoints", say=lambda _: None)
  checkpoints.save(1, on(toy.mesh_of(8), states[0]), LOADER, CONFIG)
  with pytest.raises(BadInput, match="Not a directory"):
    checkpoints.wait()


def test_what_cannot_be_deleted_is_told_once_and_costs_no_save(tmp_path, states, monkeypatch):
  delete = shutil.rmtree

  def held(path, *args, **kwargs):
    if any((Path(path) / name).exists() for name in ("open", manifest.NAME)):
      raise OSError(39, "Directory not empty", str(path))
    delete(path, *args, **kwargs)

  monkeypatch.setattr(shutil, "rmtree", held)
  for name in (".nfs0001", ".DS_Store"):
    (tmp_path / "unfinished").mkdir(exist_ok=True)
    (tmp_path / "unfinished" / name).write_text("")
  (tmp_path / "unfinished" / "9").mkdir()
  (tmp_path / "unfinished" / "9" / "open").write_text("")
  said = []
  checkpoints = save(tmp_path, states, 1, 2, 3, 3, keep=1, say=said.append)
  assert checkpoints.steps() == [3]
  left = sorted(path.name for path in (tmp_path / "unfinished").iterdir())
  assert [name.rpartition(".")[0] or name for name in left] == ["9", "old.1", "old.2", "old.3"]
  assert sorted(said) == [f"{tmp_path}/unfinished/{name} cannot be deleted (Directory not empty) and takes room: "
                          "delete it." for name in left]
  checkpoints.save(9, on(toy.mesh_of(8), states[0]), LOADER, CONFIG)
  with pytest.raises(BadInput, match=f"step 9 was not written: {tmp_path}/unfinished/9 is in the way: delete it"):
    checkpoints.wait()


def test_an_old_checkpoint_that_stays_in_its_place_costs_no_save(tmp_path, states, monkeypatch):
  rename, said = Path.rename, []

  def refused(path, to):
    if path == tmp_path / "1":
      raise PermissionError(13, "Permission denied", str(path))
    return rename(path, to)

  monkeypatch.setattr(Path, "rename", refused)
  assert save(tmp_path, states, 1, 2, 3, keep=1, say=said.append).steps() == [1, 3]
  assert said == [f"{tmp_path}/1 cannot be deleted (Permission denied) and takes room: delete it."]


SAVER = """
import sys; sys.argv = ["toy", "", "", "2"]
import jax.numpy as jnp
from anisora_jax.checkpoints.orbax import Checkpoints
checkpoints = Checkpoints({folder!r}, keep=2)
first = max(checkpoints.steps(), default=0) + 1
for step in range(first, first + 1000):
  checkpoints.save(step, {{"x": [jnp.full((256, 256), step + part) for part in range(8)]}}, {{"at": step}}, {{}})
  checkpoints.wait()
  print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
  draw, abstract = random.Random(time.time_ns()), {"x": [jax.ShapeDtypeStruct((256, 256), jnp.int32)] * 8}
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(
    jax.devices()[0])), abstract)
  for _ in range(3):
    saver = subprocess.Popen([sys.executable, "-c", SAVER.format(folder=str(tmp_path))], stdout=subprocess.PIPE,
                             cwd=Path(__file__).parents[1], text=True)
    finished = [int(saver.stdout.readline()), int(saver.stdout.readline())]
    time.sleep(draw.uniform(0, 0.3))
    saver.send_signal(signal.SIGKILL)
    finished += [int(line) for line in saver.stdout.read().split()]
    said = []
    step, state, loader = Checkpoints(tmp_path, say=said.append).restore(abstract)
    assert step >= finished[-1] and loader == {"at": step} and said == []
    assert [int(x.min()) for x in state["x"]] == [int(x.max()) for x in state["x"]] == [step + p for p in range(8)]


PAIR = """
import sys; sys.argv = ["toy", "", "", "1"]
import time
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_enable_preemption_service", False)
jax.distributed.initialize("localhost:{port}", 2, {number}, shutdown_timeout_seconds=1)
from anisora_jax.checkpoints import manifest
from anisora_jax.checkpoints.orbax import Checkpoints
from anisora_jax.errors import BadInput
write = manifest.write
def slow(folder, step):
  time.sleep(3)
  if step == 1:
    raise OSError("full")
  write(folder, step)
manifest.write = slow
state = {{"x": jax.make_array_from_callback((4,), jax.NamedSharding(jax.make_mesh((2,), ("a",)), jax.P("a")),
                                            lambda index: jax.numpy.arange(4.0)[index])}}
with Checkpoints({folder!r}) as checkpoints:
  for step in (1, 2):
    checkpoints.save(step, state, {{}}, {{}})
    try:
      checkpoints.wait()
      print(step, "finished", flush=True)
    except BadInput as error:
      print(step, "lost:", error, flush=True)
"""


def test_no_host_leaves_before_the_first_says_how_a_save_ended(tmp_path):
  """JAX ends all hosts when one leaves much later than another: here a second later, in which nothing is finished."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  hosts = [subprocess.Popen([sys.executable, "-c", PAIR.format(port=port, number=number, folder=str(tmp_path))],
                            cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
           for number in (0, 1)]
  try:
    said = [host.communicate(timeout=120) for host in hosts]
  finally:
    for host in hosts:
      host.kill()
  assert [host.returncode for host in hosts] == [0, 0], [err[-2000:] for _, err in said]
  for out, _ in said:
    lost, finished = [line for line in out.splitlines() if "Gloo" not in line]
    assert lost.startswith("1 lost: the ") and "was not finished" in lost and finished == "2 finished"
  assert Checkpoints(tmp_path).steps() == [2] and manifest.fault(tmp_path / "2", 2) is None


def test_one_trainer_at_a_time_and_a_killed_one_locks_nothing(tmp_path):
  holder = subprocess.Popen([sys.executable, "-c", f"""
import time
from anisora_jax.checkpoints import workdir
with workdir.lock({str(tmp_path)!r}):
  print("held", flush=True); time.sleep(60)
"""], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1], text=True)
  assert holder.stdout.readline() == "held\n"
  with pytest.raises(BadInput, match=f"in use by process {holder.pid} on ") as caught, workdir.lock(tmp_path):
    pass
  assert "\n" not in str(caught.value)
  holder.kill()
  holder.wait()
  for _ in range(2):
    with workdir.lock(tmp_path):
      assert "process" in (tmp_path / "lock").read_text()


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(BadInput, match="cannot be a run's folder"), workdir.lock(tmp_path / "file"):
    pass


def test_another_config_is_refused_with_the_difference(tmp_path):
  old = {"model": {"depth": 4, "sizes": (1, 2)}, "train": {"steps": 10, "rate": 1e-4}, "gone": None}
  assert workdir.keep_config(tmp_path, old) == {}
  assert workdir.keep_config(tmp_path, old) == {}
  new = {"model": {"depth": 6, "sizes": [1, 2]}, "train": {"steps": 20, "rate": 1e-4}}
  with pytest.raises(BadInput) as caught:
    workdir.keep_config(tmp_path, new, ["train.*"])
  assert str(caught.value) == (f"{tmp_path} holds a run of another config (gone: null -> absent; "
                               "model.depth: 4 -> 6): take these back, go on with the version that wrote it, or take "
                               "another folder.")
  assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 10
  more = {**old, "train": {"steps": 20, "rate": 1e-4}}
  assert workdir.keep_config(tmp_path, more, ["train.*"]) == {"train.steps": "10 -> 20"}
  assert workdir.keep_config(tmp_path, more) == {}


def test_a_run_goes_on_with_the_fields_that_it_is_older_than_and_says_so(tmp_path):
  old = {"model": {"depth": 4}}
  workdir.keep_config(tmp_path, old)
  new = {"model": {"depth": 4, "packed": 0}, "added": {"a": []}}
  said = {"added.a": "absent -> [], for the run is older than this field",
          "model.packed": "absent -> 0, for the run is older than this field"}
  with pytest.raises(BadInput, match=r"config \(model\.depth: 4 -> 6\)"):
    workdir.keep_config(tmp_path, {**new, "model": {"depth": 6, "packed": 0}})
  assert workdir.keep_config(tmp_path, new) == said
  assert workdir.keep_config(tmp_path, new) == {}
  with pytest.raises(BadInput, match=r"model\.packed: 0 -> 8"):  # now it has been chosen
    workdir.keep_config(tmp_path, {**new, "model": {"depth": 4, "packed": 8}})


@pytest.mark.parametrize("text", ["", "[1]", "{", '"x"'])
def test_a_spoilt_config_is_one_line_for_who_trains_and_who_samples(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  for read in (lambda: workdir.keep_config(tmp_path, {"a": 1}), lambda: runs.saved_config(tmp_path)):
    with pytest.raises(BadInput, match=r"config\.json is not a config"):
      read()


def test_a_config_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
  workdir.keep_config(tmp_path, {"a": 1})
  seen, sync = [], workdir.os.fsync
  monkeypatch.setattr(workdir.os, "fsync", lambda number: (sync(number), seen.append(
    [json.loads((tmp_path / f"config.{end}").read_text()) for end in ("partial", "json")])))
  workdir.keep_config(tmp_path, {"a": 2}, ["*"])
  assert seen == [[{"a": 2}, {"a": 1}]] and json.loads((tmp_path / "config.json").read_text()) == {"a": 2}


def test_nonsense_is_refused(tmp_path):
  with pytest.raises(BadInput, match="checkpoints to keep"):
    Checkpoints(tmp_path, keep=0)
  assert orbax.agreed(3) == 3
