"""Runs as users start them: a killed one goes on bit for bit, on another mesh nearly so; wrong input is one line."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import WanTransformer3DModel
from drawn import FEW, FEW_TASKS, packed
from ml_collections import ConfigDict
from overtake import overtaking
from peft import PeftModel
from PIL import Image
from safetensors.numpy import load_file
from test_loaders import clip_of, write_folder

from anisora_jax import errors
from anisora_jax.adapters import files
from anisora_jax.adapters.lora import Lora
from anisora_jax.checkpoints.orbax import Checkpoints
from anisora_jax.errors import BadInput
from anisora_jax.experiment import adapters, convert, origin, parts, runs, sample, studio, train, weights
from anisora_jax.loaders import buckets
from anisora_jax.models.wan.names import NAMINGS, entries
from anisora_jax.parallel import mesh as meshes
from anisora_jax.sampling.request import Request, lay_out, parse_keyframes
from anisora_jax.training import optimizer, report
from configs import base, tiny

ROOT = Path(__file__).resolve().parents[1]
MESH = ("--cpu_devices=8", "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.seq=2")


@pytest.fixture(scope="session")
def records(tmp_path_factory) -> Path:
  """Three small films, packed; one of them held out."""
  return packed(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
  """Subprocesses compile only once: what is compared bit for bit must be the same program anyway."""
  return {**os.environ, "JAX_PLATFORMS": "cpu",
          "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture(scope="session")
def start(records, environment):
  """Starts training as a user does; returns the process."""
  def command(folder: Path, *more: str, mesh=MESH) -> subprocess.Popen:
    words = [sys.executable, "-m", "anisora_jax.train", "--config=configs/tiny.py", f"--workdir={folder}",
             f"--config.data.records={records}", "--config.data.buckets=5x16x24@8", "--config.train.steps=6",
             "--config.train.checkpoint=3", "--config.train.report=1", "--config.train.held_out=0",
             "--config.optimizer.warmup=2", "--config.optimizer.rate=1e-3", *FEW, *mesh, *more]
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

  return command


def finish(process: subprocess.Popen) -> str:
  out, err = process.communicate(timeout=600)
  assert process.returncode == 0, err[-3000:]
  return out


@pytest.fixture(scope="session")
def straight(start, tmp_path_factory) -> Path:
  """Six steps without a stop."""
  folder = tmp_path_factory.mktemp("straight")
  finish(start(folder))
  return folder


@pytest.fixture(scope="session")
def killed(start, tmp_path_factory) -> Path:
  """Three steps and a checkpoint, then kill -9."""
  folder = tmp_path_factory.mktemp("killed")
  process = start(folder)
  end = time.time() + 600
  while process.poll() is None and not (folder / "checkpoints" / "3" / "manifest.json").exists():
    assert time.time() < end
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  return folder


def copy_of(folder: Path, to: Path) -> Path:
  subprocess.run(["cp", "-r", str(folder), str(to)], check=True)
  return to


def losses(folder: Path) -> dict[int, tuple[float, int]]:
  """Step -> (loss, which records), of the last attempt at each step."""
  rows = [json.loads(line) for line in (folder / "measures.jsonl").read_text().splitlines()]
  return {row["step"]: (row["loss"], row["records"]) for row in rows if "loss" in row}


def state_of(folder: Path, records: Path, step: int) -> dict[str, np.ndarray]:
  """Every array of a checkpoint: parameters, moments, averages, counts."""
  config = runs.saved_config(folder)
  made = parts.assemble(config)
  chain, _ = optimizer.build(made.optimizer, parts.abstract_trained(made))
  abstract, _ = train.training_state(made, chain)
  with Checkpoints(folder / "checkpoints") as checkpoints:
    number, state, _ = checkpoints.restore(abstract)
  assert number == step
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def test_six_steps_equal_three_killed_and_resumed_bit_for_bit(straight, killed, start, records, tmp_path):
  resumed = copy_of(killed, tmp_path / "run")
  assert "resumes after step 3" in finish(start(resumed))
  assert losses(resumed) == losses(straight) and len(losses(straight)) == 6
  one, other = state_of(straight, records, 6), state_of(resumed, records, 6)
  assert len(one) > 60 and one.keys() == other.keys()
  for name, value in one.items():
    np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_each_step_is_reported_with_the_learning_rate_of_its_update(straight):
  rows = [json.loads(line) for line in (straight / "measures.jsonl").read_text().splitlines()]
  told = {row["step"]: row["rate"] for row in rows if "loss" in row}
  half = [(1 + math.cos(math.pi * n / 4)) / 2 for n in range(4)]  # the cosine of the four steps after the warm-up
  expected = [5e-4, 1e-3, *(1e-3 * (0.05 + 0.95 * share) for share in half)]
  assert list(told) == [1, 2, 3, 4, 5, 6]
  np.testing.assert_allclose(list(told.values()), expected, rtol=1e-6)


def test_adapters_train_beside_a_run_s_weights_the_same_on_every_mesh(straight, records, start, tmp_path):
  base = f"--config.model.weights={straight}"
  adapted = ("--config.lora.rank=2", "--config.lora.alpha=4", base)
  runs = {"eight": start(tmp_path / "eight", *adapted), "one": start(tmp_path / "one", *adapted, mesh=())}
  assert all("17,920 of adapters are trained" in finish(run) for run in runs.values())
  finish(start(tmp_path / "whole", base))
  eight, one, whole = (losses(tmp_path / name) for name in ("eight", "one", "whole"))
  assert eight[1] == whole[1]  # adapters begin as nothing
  np.testing.assert_allclose([eight[n][0] for n in eight], [one[n][0] for n in one], rtol=2e-4)
  assert abs(eight[6][0] - whole[6][0]) > 1e-4
  kept = state_of(tmp_path / "eight", records, 6)
  assert sum(x.size for x in kept.values()) == 4 * 17_920 + 3  # parameters, average, two moments; three counts of steps
  assert all(np.abs(x).max() > 0 for name, x in kept.items() if "lora_b" in name)
  made = studio.open_run(tmp_path / "eight", {})
  assert sample.compare(made, "first", 1, made.parts.buckets[0])[0].psnr["model"] > 0
  up = kept[".params['blocks']['mlp']['up']['lora_b']"]
  for form in adapters.FORMATS:
    convert.convert(tmp_path / "eight", tmp_path / form, form)
    tensors = load_file(next((tmp_path / form).glob("*.safetensors")))
    assert len(tensors) == (3 if "comfyui" in form or "kohya" in form else 2) * 10 * 4
    back, _ = files.read(tensors, {naming: entries(made.parts.size, naming) for naming in NAMINGS})
    np.testing.assert_allclose(back["blocks"]["mlp"]["up"]["lora_b"], 2 * up, rtol=1e-6)  # alpha / rank
  model = WanTransformer3DModel(num_attention_heads=4, attention_head_dim=24, in_channels=25, out_channels=12,
                                text_dim=64, ffn_dim=256, num_layers=4)
  loaded = dict(PeftModel.from_pretrained(model, tmp_path / "lora_peft").named_parameters())
  theirs = [loaded[f"base_model.model.blocks.{layer}.ffn.net.0.proj.lora_B.default.weight"] for layer in range(4)]
  np.testing.assert_allclose(np.stack([x.detach().numpy().T for x in theirs]), 2 * up, rtol=1e-6)
  with pytest.raises(BadInput, match="trained the network itself"):
    convert.convert(straight, tmp_path / "none", "lora_peft")
  assert not (tmp_path / "none").exists()
  convert.convert(tmp_path / "eight", tmp_path / "merged", "diffusers", choice=convert.Choice(ema=True))
  merged = load_file(next((tmp_path / "merged").glob("*.safetensors")))["blocks.1.ffn.net.0.proj.weight"].T
  np.testing.assert_allclose(merged, made.rack.get(0)["blocks"]["mlp"]["up"]["kernel"][1], rtol=1e-5, atol=1e-6)


def test_buckets_that_group_the_devices_each_in_their_way_train_as_on_one_device(start, tmp_path):
  plain, few = "5x16x24@8,5x16x16@2:2", "--config.train.steps=3"
  turns = buckets.Schedule(buckets.parse(plain), seed=0)
  assert {turns[step].bucket for step in range(3)} == {0, 1}
  grouped = plain.replace("@2", "@2/4")
  mesh = "--cpu_devices=8", "--config.mesh.replica=2"
  assert "data 2 x fsdp 4" in finish(start(tmp_path / "eight", f"--config.data.buckets={grouped}", few, mesh=mesh))
  finish(start(tmp_path / "one", f"--config.data.buckets={plain}", few, mesh=()))
  eight, one = losses(tmp_path / "eight"), losses(tmp_path / "one")
  assert [eight[n][1] for n in eight] == [one[n][1] for n in one]
  np.testing.assert_allclose([eight[n][0] for n in eight], [one[n][0] for n in one], rtol=2e-4)


def test_a_run_that_is_killed_has_said_which_records_it_left_out(start, records, tmp_path):
  spoilt = copy_of(records, tmp_path / "records")
  for split in ("train", "held_out"):
    shard = sorted(spoilt.glob(f"{split}-*"))[0]
    content = bytearray(shard.read_bytes())
    content[1500] ^= 255
    shard.write_bytes(content)
  run = start(tmp_path / "run", f"--config.data.records={spoilt}", "--config.train.held_out=2")
  while run.poll() is None and not (tmp_path / "run" / "checkpoints" / "3" / "manifest.json").exists():
    time.sleep(0.02)
  run.send_signal(signal.SIGKILL)
  said = run.communicate()[1].splitlines()
  for split in ("train", "held_out"):
    assert sum(line.startswith(f"left out of {split}: {spoilt} record ") for line in said) == 1, said
  shown = next(line for line in said if line.startswith("step 1/6: "))
  assert re.search(r"unread [1-9]", shown), shown  # each batch reads more rows than there are records


def test_a_run_saved_on_eight_devices_goes_on_with_four(straight, killed, start, tmp_path):
  resumed = copy_of(killed, tmp_path / "run")
  out = finish(start(resumed, mesh=("--cpu_devices=4", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")))
  assert "mesh.tensor: 1 -> 2" in out
  for step in (4, 5, 6):
    (loss, read), (other, also_read) = losses(straight)[step], losses(resumed)[step]
    assert read == also_read
    np.testing.assert_allclose(loss, other, rtol=2e-6 if step > 4 else 1e-6)  # two updates apart by rounding


def test_sigterm_while_starting_saves_and_ends_well(start, tmp_path):
  process = start(tmp_path / "run")
  while process.poll() is None and not (tmp_path / "run" / "lock").exists():
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  assert "the same command goes on" in finish(process)
  assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdecimal()]


def test_a_second_config_in_one_folder_is_refused_with_the_difference(killed, start):
  process = start(killed, "--config.optimizer.decay=0.5")
  _, err = process.communicate(timeout=300)
  lines = [line for line in err.splitlines() if line.startswith("error:")]
  assert process.returncode == 2 and len(lines) == 1 and "Traceback" not in err
  assert "optimizer.decay: 0.0001 -> 0.5" in lines[0]


@pytest.fixture
def made(straight):
  return studio.open_run(straight, {"sample.steps": 2}, count=1)


def test_sampled_films_keep_what_was_given_and_come_with_their_sheet(made, tmp_path):
  still = np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8)
  Image.fromarray(still).save(tmp_path / "a.png")
  request = Request(5, 16, 24, 12.0, first=str(tmp_path / "a.png"), keyframes={3: str(tmp_path / "a.png")})
  canvas, mask = lay_out(request, made.parts.codec.spatial)
  films = made.films(canvas[None], mask[None], ["a cat"], 0)[0]
  np.testing.assert_array_equal(films[[0, 3]], np.stack([still, still]))
  assert not np.array_equal(films[1], still)
  sample.make(made, [sample.Order(request, "a cat", tmp_path / "film", seed=0)])
  assert all((tmp_path / f"film.{kind}").stat().st_size > 200 for kind in ("mp4", "gif", "png"))


def test_a_region_is_redrawn_and_nothing_else(made, tmp_path):
  still = np.random.default_rng(1).integers(0, 255, (16, 24, 3), np.uint8)
  Image.fromarray(still).save(tmp_path / "a.png")
  region = np.full((16, 24), 255, np.uint8)
  region[4:12, 8:16] = 0
  Image.fromarray(region).save(tmp_path / "mask.png")
  canvas, mask = lay_out(Request(5, 16, 24, 12.0, first=str(tmp_path / "a.png"), region=str(tmp_path / "mask.png")), 2)
  films = made.films(canvas[None], mask[None], [""], 0)[0]
  outside = np.broadcast_to(region > 0, films.shape[:3])
  np.testing.assert_array_equal(films[outside], np.broadcast_to(still, films.shape)[outside])
  assert not np.array_equal(films[1:], np.broadcast_to(still, films.shape)[1:])


def test_hidden_pixels_never_reach_a_film(made):
  rng = np.random.default_rng(2)
  frames, mask = rng.integers(0, 255, (1, 5, 16, 24, 3), np.uint8), np.zeros((1, 5, 8, 12), bool)
  mask[:, 0] = True
  other = frames.copy()
  other[:, 1:] = rng.integers(0, 255, other[:, 1:].shape, np.uint8)
  np.testing.assert_array_equal(made.films(frames, mask, [""], 0), made.films(other, mask, [""], 0))


def test_a_run_in_bfloat16_is_sampled_by_its_averages(straight):
  one, other = (studio.open_run(straight, {"model.dtype": dtype}, count=1).rack.get(0)["blocks"]["mlp"]["up"]["kernel"]
                for dtype in ("float32", "bfloat16"))
  assert other.dtype == jnp.bfloat16 and (other == one.astype(jnp.bfloat16)).all()


def test_a_run_of_cards_is_sampled_where_none_are(straight, environment, tmp_path):
  run = copy_of(straight, tmp_path / "run")
  config = json.loads((run / "config.json").read_text())
  config["model"] |= {"kernel": "cudnn", "dtype": "bfloat16", "attention": "local_global"}  # with no window for it
  (run / "config.json").write_text(json.dumps(config))
  words = [sys.executable, "-m", "anisora_jax.sample", f"--workdir={run}", "--steps=1", f"--out={tmp_path / 'film'}"]
  refused = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert refused.returncode == 2 and "pattern 'local_global' needs" in refused.stderr
  subprocess.run([*words, "--kernel=blockwise", "--attention=ring"], cwd=ROOT, env=environment, check=True)
  assert (tmp_path / "film.mp4").exists()


def test_a_run_of_clips_that_share_rows_is_sampled_a_clip_at_a_time(straight, tmp_path):
  run = copy_of(straight, tmp_path / "run")
  config = json.loads((run / "config.json").read_text())
  config["data"] |= {"encoded": True, "packed": 2}
  (run / "config.json").write_text(json.dumps(config))
  assert studio.open_run(run, {"data.encoded": False}, count=1).parts.packed == 0


def test_of_devices_that_do_not_divide_weights_as_many_work_as_do(straight, capsys):
  assert studio.open_run(straight, {}, count=6).parts.mesh.size == 4
  assert re.fullmatch(r"works on 4 of 6 devices: .* does not divide by .* = 6.*\n", capsys.readouterr().err)
  assert studio.open_run(straight, {}, count=8).parts.mesh.size == 8 and not capsys.readouterr().err


def test_the_held_out_loss_is_that_of_the_first_bucket_with_clips(records):
  """All are wider than high."""
  config = settings(records, data__buckets="9x24x16@8,5x16x24@8", data__assign="fit")
  made = parts.assemble(config)
  chain, _ = optimizer.build(made.optimizer, parts.abstract_trained(made))
  frozen, captions = train.frozen_parts(made, config)
  clips = train.held_out_clips(made, config)
  measure = train.held_out_loss(made, clips, 2, frozen, captions, report.LeftOut(pytest.fail, "held_out"))
  assert math.isfinite(measure(train.training_state(made, chain)[1](None))["held_out"])


def test_without_held_out_clips_a_run_ends_before_its_weights_are_read_and_says_what_to_do(tmp_path, monkeypatch):
  folder = write_folder(tmp_path / "records", [clip_of("a")])
  monkeypatch.setattr(train, "frozen_parts", lambda *_: pytest.fail("weights are read"))
  with pytest.raises(BadInput, match=r"no 'held_out' records: .* without a held-out loss: --config.train.held_out=0\."):
    train.train(settings(folder), tmp_path / "run")


def test_hosts_with_other_records_are_refused(records, monkeypatch):
  config = settings(records)
  monkeypatch.setattr(meshes, "alike", lambda number: False)
  with pytest.raises(BadInput, match="hosts find other 'train' records there, or other lengths"):
    parts.loader(parts.assemble(config), config, "train")


def test_held_out_clips_become_films_numbers_and_a_page(made, straight):
  scores = sample.gallery(made, straight, ["first", "first_last", "character"], count=2, show=1, say=lambda _: None)
  written = json.loads((straight / "samples" / "scores.json").read_text())
  assert [row["task"] for row in written] == ["first", "first_last", "character"] == [one.task for one in scores]
  page = (straight / "samples" / "report.html").read_text()
  assert all(f"{row['task']}-0.png" in page and (straight / "samples" / f"{row['task']}-0.mp4").exists()
             for row in written)
  assert "cross-fade" in written[1] and "cross-fade" not in written[0]


def test_every_field_of_the_base_config_is_read_by_the_assembly():
  source = "".join(path.read_text() for path in (ROOT / "anisora_jax" / "experiment").glob("*.py"))
  config, missing = base.get_config(), []
  made = {"optimizer": optimizer.Optimizer, "lora": Lora}
  whole = {"mesh", "tasks", "times"}  # read as a whole: their fields are checked by the parts that take them
  short = {"codec": "settings.", "text": "settings.", "sample": "settings.", "loss": "loss."}  # called so there
  for section, fields in config.items():
    if not isinstance(fields, ConfigDict):
      missing += [] if f"config.{section}" in source else [section]
    elif section in made:
      missing += sorted(set(fields) - set(made[section].__dataclass_fields__) - {"offload"})
    elif section in whole:
      assert f"config.{section}.to_dict()" in source
    else:
      missing += [f"{section}.{name}" for name in fields if not any(
        words in source for words in (f"config.{section}.{name}", f'"{section}.{name}"',
                                      f"{short.get(section, chr(0))}{name}"))]
  assert not missing


def settings(records: Path, **changes) -> ConfigDict:
  config = tiny.get_config()
  config.data.records = str(records)
  for name, value in changes.items():
    section, field = name.split("__")
    config[section][field] = value
  return config


WRONG = {  # a config's wrong fields -> what the line must say
  "a codec of other channels": (dict(codec__spatial=4), "channels"),
  "weights that are not there": (dict(model__weights="nowhere"), "nowhere does not exist"),
  "adapters beside nothing": (dict(lora__rank=4), "there is no base to adapt"),
  "adapters folded into nothing": (dict(model__adapters=f"{ROOT / 'README.md'}=0.8"), "no weights to fold them into"),
  "adapters that are not there": (dict(model__adapters="none.st", model__weights="nowhere"), "none.st do not exist"),
  "a size nobody made": (dict(model__size="tiney"), "did you mean 'tiny'"),
  "a mesh of another count": (dict(mesh__seq=3), "needs"),
  "two free axes": (dict(mesh__seq=-1), "at most one is -1"),
  "heads not divisible by tensor": (dict(mesh__fsdp=1, mesh__tensor=8), "do not divide by mesh axis tensor"),
  "a GPU kernel on the CPU": (dict(model__kernel="cudnn", model__dtype="bfloat16"), "needs a GPU"),
  "full attention over shards": (dict(mesh__fsdp=4, mesh__seq=2, model__attention="full"), "use 'ring'"),
  "a batch that does not divide": (dict(data__buckets="9x32x48@4"), "take a multiple"),
  "a bucket that is no size": (dict(data__buckets="9x32@16"), "FRAMESxHEIGHTxWIDTH@BATCH"),
  "two buckets of one size": (dict(data__buckets="9x32x48@16,9x32x48@8/2"), "keep one of them"),
  "a bucket without a batch or a budget": (dict(data__buckets="9x32x48"), "give --config.data.tokens"),
  "pixels that do not fit the codec": (dict(data__buckets="9x33x48@16"), "multiples of 4, for example 32x48"),
  "latents that do not fit patches": (dict(data__buckets="9x34x48@16"), "multiples of 4"),
  "no records": (dict(data__records=""), "made by data/pack.py"),
  "missing records": (dict(data__records="/nowhere/at/all"), "/nowhere/at/all"),
  "longer clips than there are": (dict(data__buckets="49x32x48@16"), "take fewer frames"),
  "a probability above 1": (dict(times__per_frame=1.5), "no probability"),
  "a negative task weight": (dict(tasks__first=-1.0), "take 0 or more"),
  "a rate of zero": (dict(optimizer__rate=0.0), "above 0"),
  "an unknown solver of times": (dict(times__law="normal"), "law of noise times"),
  "an unknown remat": (dict(model__remat="some"), "remat policy"),
  "an unknown loss weight": (dict(loss__weight="snr"), "loss weight"),
  "held-out losses of no batches": (dict(train__held_out_batches=0), "held_out_batches is 0: it must be 1 or more"),
  "no micro-batch": (dict(train__micro_batches=0), "micro_batches = 0: take 1 or more"),
  "fewer micro-batches than none": (dict(train__micro_batches=-1), "micro_batches = -1: take 1 or more"),
  "captions dropped twice": (dict(loss__drop_text=2.0), "drop_text = 2.0 is no share"),
  "an average beyond its parameters": (dict(optimizer__ema=2.0), "optimizer.ema is 2.0"),
  "given frames noisier than all": (dict(times__given=3.0), "given = 3.0 is no share"),
  "a late part before the start": (dict(times__late_from=-1.0), "late_from = -120 is no step"),
  "a late part that never comes": (dict(times__late_from=math.nan), "late_from = nan is no share of a run"),
  "latents of nothing": (dict(codec__scale=0.0), "codec.scale is 0.0: it must be above 0"),
  "frozen parts that are not there": (dict(optimizer__frozen="decoder/"), "meets no"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_configs_are_one_line_and_leave_nothing(case, records, tmp_path, capsys):
  changes, said = WRONG[case]
  status = errors.run(lambda: train.train(settings(records, **changes), tmp_path / "run"))
  lines = capsys.readouterr().err.splitlines()
  assert status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], lines
  assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_whose_checkpoints_are_not_whole_is_not_begun_again(records, tmp_path):
  (tmp_path / "checkpoints" / "2").mkdir(parents=True)
  with pytest.raises(BadInput, match="no finished checkpoint"):
    train.train(settings(records), tmp_path)
  assert not (tmp_path / "config.json").exists()


def test_a_run_without_a_checkpoint_may_be_begun_otherwise_and_tells_of_random_weights(records, tmp_path, monkeypatch):
  """As one whose first step did not fit the memory: no step is made here."""
  monkeypatch.setattr(train.loop, "run", lambda now, *_: (now, 0, False))
  said = []
  for parts_of_a_batch in (1, 2):
    changes = dict(data__buckets="5x16x24@16", train__held_out=0, train__micro_batches=parts_of_a_batch)
    train.train(settings(records, **changes), tmp_path, said.append)
  assert runs.saved_config(tmp_path).train.micro_batches == 2
  assert "\n".join(said).count("\nstarts from random weights; --config.pretrained=FOLDER") == 2


def test_adapters_stay_beside_the_checkpoint_that_they_began_with(records, tmp_path, monkeypatch):
  """Their base trains on; they are resumed, sampled and merged."""
  def goes(folder: Path, step: int, **changes):
    def saves(now, advance, batches, due, effects, *_):
      effects.save(step, now, batches.position)
      effects.wait()
      return now, step, False

    monkeypatch.setattr(train.loop, "run", saves)
    train.train(settings(records, data__buckets="5x16x24@8", train__held_out=0, **changes), folder, lambda line: None)

  base, tuned, taken, find = tmp_path / "base", tmp_path / "tuned", [], weights.leaves.find
  adapted = dict(model__weights=str(base), lora__rank=2)
  monkeypatch.setattr(weights.leaves, "find", lambda path, *more: (taken.append(Path(path)), find(path, *more))[1])
  goes(base, 1)
  goes(tuned, 1, **adapted)
  goes(base, 2)
  goes(tuned, 2, **adapted)
  studio.open_run(tuned, {}, count=1)
  convert.convert(tuned, tmp_path / "merged", "ours", say=lambda line: None)
  of_base = [path.relative_to(base) for path in taken if path.is_relative_to(base)]
  assert of_base == [Path("checkpoints/1")] * 4


def test_adapters_whose_checkpoint_is_gone_are_refused_and_one_that_moved_is_found(tmp_path):
  def checkpoint(run: str, files: str) -> Path:
    folder = tmp_path / run / "checkpoints" / "3"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(files)
    return folder

  def base(run: str) -> str:
    return origin.base_of(tmp_path, settings(tmp_path, model__weights=str(tmp_path / run), lora__rank=2))

  assert base("base") == str(tmp_path / "base")  # of a run from before it was written down
  own, config = checkpoint("base", "{}"), settings(tmp_path, model__weights=str(tmp_path / "base"), lora__rank=2)
  source = weights.Source(tmp_path / "base", weights.FROM_PARAMS, parts.SIZES["tiny"], {}, (own, "state", "params"))
  origin.remember(tmp_path, config, source)
  elsewhere = checkpoint("moved", "{}")
  checkpoint("other", "[]")
  assert base("base") == str(own) and base("moved") == str(elsewhere) and base("other") == str(tmp_path / "other")
  for harm in (lambda: (own / "manifest.json").write_text("[]"), lambda: shutil.rmtree(own)):
    harm()
    with pytest.raises(BadInput, match=r"trained beside step 3 of .*base, which is gone or another by now: restore "):
      base("base")


def test_a_run_goes_on_with_another_rate_and_with_micro_batches_that_leave_its_batches_as_they_are(
    records, tmp_path, monkeypatch):
  """One that is no longer finite is told to lower its rate. Batches are of 24 clips, as data.tokens says; those that
  went on are of fewer records under the same name."""
  def saves(now, advance, batches, due, effects, *_):
    effects.save(1, now, batches.position)
    effects.wait()
    return now, 1, False

  def goes(**changes):
    made = settings(there, data__buckets="5x16x24", data__tokens=24 * 5 * 4 * 6, train__held_out=0, **changes)
    train.train(made, tmp_path / "run", said.append)

  said, there = [], copy_of(records, tmp_path / "records")
  monkeypatch.setattr(train.loop, "run", saves)
  goes()
  shutil.rmtree(there)
  write_folder(there, [clip_of("a"), clip_of("b")])
  changes = dict(optimizer__rate=1e-4, optimizer__clip=0.5, train__held_out_batches=3, train__micro_batches=3)
  goes(**changes)
  told = "\n".join(said)
  assert all(f"resumes with another {name.replace('__', '.')}: " in told for name in changes)
  assert re.search("resumes after step 1 of 120, among 2 clips where there were [0-9]+: records are others", told)
  with pytest.raises(BadInput, match=r"were of 24 clips and are now of 16, .* as many devices and micro-batches"):
    goes(train__micro_batches=2)


def test_what_a_clip_shared_by_devices_takes_is_estimated(records):
  said = []
  for buckets_ in ("5x16x24@8", "5x16x24@1/8"):
    train.dry_run(settings(records, data__buckets=buckets_), said.append, compiled=False)
  whole, shared = (float(re.search(r"estimate +([\d.]+) MiB", line)[1]) for line in said if "estimate" in line)
  assert shared < whole


def test_a_field_that_an_older_run_has_not_saved_is_named_when_it_is_wanted(tmp_path):
  fields = json.loads(tiny.get_config().to_json_best_effort())
  del fields["text"], fields["model"]["adapters"]
  (tmp_path / "config.json").write_text(json.dumps(fields))
  saved = runs.saved_config(tmp_path)
  assert saved.model.size == "tiny"
  for name, read in {"text": lambda: saved.text, "adapters": lambda: saved.model.adapters}.items():
    with pytest.raises(BadInput, match=f"no field '{name}', so an older version wrote it"):
      read()


REQUESTS = {
  "a keyframe out of range": (dict(keyframes={9: "a.png"}), "take 0 .. 4"),
  "a loop with an end": (dict(first="a.png", last="a.png", loop=True), "loop needs"),
  "a region over nothing": (dict(region="mask.png"), "--region needs"),
  "a clip for no use": (dict(clip="c.mp4"), "--clip needs --keep"),
  "frames kept of no clip": (dict(first="a.png", keep=2), "add --clip film.mp4"),
  "two pictures of the first frame": (dict(first="a.png", keyframes={0: "wide.png"}), "frame 0, a.png and wide.png"),
  "two pictures of the last frame": (dict(last="a.png", keyframes={4: "wide.png"}), "frame 4, a.png and wide.png"),
  "a loop's end drawn apart": (dict(first="a.png", loop=True, keyframes={4: "wide.png"}), "frame 4, a.png and"),
  "all frames kept": (dict(clip="c.mp4", keep=5), "take 1 .. 4"),
  "a missing still": (dict(first="none.png"), "does not exist"),
  "a text named png": (dict(first="text.png"), "is not an image"),
  "another aspect": (dict(first="wide.png"), "--fit crop"),
  "a region that hides nothing": (dict(first="a.png", region="white.png"), "hides no pixel"),
  "nothing left to make": (dict(keyframes=dict.fromkeys(range(5), "a.png")), "nothing is left"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_wrong_requests_are_one_line(case, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  Image.new("RGB", (24, 16)).save("a.png")
  Image.new("RGB", (48, 16)).save("wide.png")
  Image.new("L", (24, 16), 255).save("white.png")
  Image.new("L", (24, 16), 0).save("mask.png")
  Path("text.png").write_text("no picture")
  wrong, said = REQUESTS[case]
  with pytest.raises(BadInput, match=said) as mistake:
    lay_out(Request(5, 16, 24, 12.0, **wrong), 4)
  assert "\n" not in str(mistake.value)


def test_malformed_keyframes_are_refused():
  for word in ("12", "=a.png", "x=a.png", "3="):
    with pytest.raises(BadInput, match="FRAME=IMAGE"):
      parse_keyframes([word])
  with pytest.raises(BadInput, match=r"two pictures are given for frame 3, a\.png and b\.png: leave out one"):
    parse_keyframes(["3=a.png", "03=b.png"])
  assert parse_keyframes(["0=a.png", "12=b=c.png"]) == {0: "a.png", 12: "b=c.png"}


@pytest.mark.parametrize(("words", "said"), [
  (["train", "--config=configs/tiny.py", "--config.train.stps=3"],
   "no config field is named config.train.stps: did you mean 'config.train.steps'?"),
  (["train", "--config", "configs/tiny.py", "--config.dta.records=a"], "did you mean 'config.data.records'?"),
  (["train", "--config=configs/tiny.py", "--learning_rate=3"], "no flag is named --learning_rate: see --help; "
   "fields are in configs/base.py, as --config.optimizer.rate=3e-4."),
  (["train", "--config=configs/nothing.py", "--workdir=x"], "configs/nothing.py"),
  (["train", "--confg=configs/tiny.py"], "did you mean 'config'"),
  (["train", "--config.data.records=a", "--workdir=x"], "no --config was given: add --config configs/tiny.py."),
  (["sample", "--workdir=x", "--config.sample.steps=4"], "settings of a run are flags, --steps 4."),
  (["sample", "--workdir=x", "--config=configs/tiny.py"], "--config was given beside --workdir x, a run"),
], ids=lambda given: " ".join(given) if isinstance(given, list) else "")
def test_wrong_flags_are_one_line_with_the_nearest_name(words, said, environment, tmp_path):
  done = subprocess.run([sys.executable, "-m", f"anisora_jax.{words[0]}", *words[1:]], cwd=ROOT, env=environment,
                        capture_output=True, text=True)
  assert done.returncode == 2 and "Traceback" not in done.stderr
  assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_help_explains_and_a_dry_run_says_what_a_step_takes(environment):
  def said(*words: str) -> str:
    return subprocess.run([sys.executable, "-m", "anisora_jax.train", *words], cwd=ROOT, env=environment,
                          capture_output=True, text=True, check=True).stdout

  explained = said("--help")
  assert all(word in explained for word in ("--config", "--workdir", "--dry_run", "configs/base.py"))
  account = said("--config=configs/tiny.py", "--config.data.buckets=5x16x24@8", "--dry_run", *FEW, *MESH)
  assert all(word in account for word in ("seq 2", "620,560", "5x16x24@8", "MiB", "FLOPs a step"))


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (2, 2, 1, 2), pytest.param((1, 4, 2, 1), marks=pytest.mark.product)],
                         ids=str)
def test_no_collective_of_a_step_can_overtake_those_of_a_loop(sizes):
  """Or simulated devices may meet them in another order and wait for each other forever."""
  config = settings("", data__buckets="5x16x24@8")
  config.update({"mesh": dict(zip(("data", "fsdp", "seq", "tensor"), sizes, strict=True)), "tasks": FEW_TASKS})
  made = parts.assemble(config)
  chain, _ = optimizer.build(made.optimizer, parts.abstract_trained(made))
  state, _ = train.training_state(made, chain)
  run = train.compiled_step(made, chain, state)
  lowered = run.lower(state, train.abstract_batch(made, made.buckets[0]), train.abstract_frozen(made, config))
  hlo = lowered.compile().as_text()
  assert " while(" in hlo and "all-reduce(" in hlo
  assert overtaking(hlo) == []


def test_bfloat16_trains_with_float32_parameters(records):
  config = settings(records, model__dtype="bfloat16", data__buckets="5x16x24@8")
  made = parts.assemble(config)
  assert made.network.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(parts.abstract_params(made))} == {jnp.dtype("float32")}
