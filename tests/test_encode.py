"""Clips become latents as diffusers and transformers make them, once, whatever stops it; and the latents train."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import test_encoders
import test_vae
import torch
from compare import apart
from drawn import packed

from anisora_jax import errors, keys
from anisora_jax.errors import BadInput
from anisora_jax.experiment import encode, encoders, parts, train
from anisora_jax.loaders import latents, tfds
from anisora_jax.loaders import records as shards
from anisora_jax.loaders.assign import Deal
from anisora_jax.loaders.buckets import Bucket
from anisora_jax.loaders.records import Records
from anisora_jax.loaders.video import Size
from anisora_jax.models.wan import text
from anisora_jax.models.wan.text import TEXT_SIZES
from anisora_jax.parallel import mesh as meshes
from anisora_jax.tasks.masks import TASKS
from anisora_jax.training import step
from configs import tiny

ROOT = Path(__file__).resolve().parents[1]
SEEING = replace(published.SIZE, image_width=published.IMAGE.width)
SIZES = {"tiny_wan": published.SIZE, "tiny_wan_i2v": SEEING}
HALF = 2e-3  # float16 keeps 11 bits
tokens = test_encoders.folder  # a fixture: the tokenizer


@pytest.fixture(scope="module", autouse=True)
def _tables():
  with published.entered(**SIZES):
    yield


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
  return packed(tmp_path_factory.mktemp("drawn"), clip_seconds=1.7)


@pytest.fixture(scope="module")
def download(tmp_path_factory, tokens):
  folder = tmp_path_factory.mktemp("Wan-tiny")
  return folder, published.write(folder, SEEING, tokens)


def config(records, download, size="tiny_wan_i2v", **changes):
  return published.config(size, records, download[0], **changes)


@pytest.fixture(scope="module")
def encoded(records, download, tmp_path_factory) -> Path:
  out = tmp_path_factory.mktemp("encoded") / "latents"
  encode.encode(config(records, download), out, 8, say=lambda line: None)
  return out


def contents(folder: Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".arrayrecord", ".json")}


def row_of(folder: Path, number: int, view: int) -> dict:
  """One clip under one of two views."""
  seed = next(seed for seed in range(99) if np.random.default_rng(seed).integers(2) == view)
  return latents.Latents(folder, "train", Bucket(9, 32, 48, 8)).row(number, np.random.default_rng(seed))


def window_of(records: Path, number: int) -> tuple[np.ndarray, str]:
  """The frames and caption that window `number` shows: clips last 20 frames, so each gives two windows of 9."""
  clip = Records(records, "train")[number // 2]
  return clip.look(number % 2 * 9 + np.arange(9), Size(32, 48))[0], clip.caption


def image_judge(model, films: np.ndarray) -> np.ndarray:
  side = published.IMAGE.side
  with torch.no_grad():
    square = torch.tensor(test_encoders.upstream_prepares(films, side=side)).float().permute(0, 3, 1, 2)
    return model(square, output_hidden_states=True).hidden_states[-2].numpy()


def test_latents_text_and_image_tokens_equal_diffusers_and_transformers(encoded, records, download):
  models, views = download[1], []
  for number in range(4):
    films, caption = window_of(records, number)
    unit = films[None].astype(np.float32) / 127.5 - 1
    told = test_encoders.tokenise(download[0] / "tokenizer", [caption], published.SIZE.text_tokens)
    text = test_encoders.text_judge(models["text_encoder"], told["input_ids"], told["attention_mask"].astype(bool))
    for view in range(2):
      row = row_of(encoded, number, view)
      assert row["caption"] == caption and apart(row["text"][None], text) < HALF
      assert apart(row["latents"][None], test_vae.theirs(models["vae"], published.VAE, unit)[0]) < HALF
      hidden = unit * row["mask"].repeat(8, 1).repeat(8, 2)[..., None]
      assert apart(row["known"][None], test_vae.theirs(models["vae"], published.VAE, hidden)[0]) < HALF
      whole = np.flatnonzero(row["mask"].all((1, 2)))
      assert apart(row["image"][None], image_judge(models["image_encoder"], hidden[0, whole[:1] if len(whole) else [0]])
                   ) < HALF
      views.append(row["mask"].tobytes())
  assert len(set(views)) > 3  # masks are drawn for each window and each view


def test_a_lesson_from_latents_is_the_lesson_from_their_clips(records, download):
  changes = {f"tasks__{task}": float(task == "first_last") for task in TASKS}
  made = parts.assemble(config(records, download, "tiny_wan", loss__drop_condition=0.0, **changes))
  frozen = step.Frozen(encoders.load_codec(config(records, download, "tiny_wan"), made.mesh, ["encoder"]), blank=0.5)
  method = step.bind(made.method, frozen)
  draw = np.random.default_rng(0)
  batch = {"frames": draw.integers(0, 256, (8, 9, 32, 48, 3), np.uint8), "character": np.zeros((8, 9, 32, 48), bool),
           "text": draw.normal(size=(8, 11, 24)).astype(np.float32), "ok": np.ones(8, np.float32)}
  lesson = jax.jit(lambda batch: step.lesson(method, batch, 3, jnp.arange(8), lambda name: keys.key(1, 3, name)))
  clips = lesson(batch)
  mask = np.zeros((8, 9, 4, 6), bool)
  mask[:, [0, -1]] = True
  stored = {"latents": clips.clean.astype(np.float16), "known": clips.given.known.astype(np.float16), "mask": mask}
  found = lesson({**stored, "text": batch["text"], "ok": batch["ok"]})
  assert apart(found.clean, clips.clean) < HALF and apart(found.given.known, clips.given.known) < HALF
  for name in ("noise", "t", "share", "text"):
    np.testing.assert_array_equal(getattr(found, name), getattr(clips, name))
  for name in ("mask", "held", "frozen"):
    np.testing.assert_array_equal(getattr(found.given, name), getattr(clips.given, name))
  assert clips.given.frozen[:, 0].all() and not clips.given.frozen[:, 1:].any()


def test_captions_are_encoded_where_the_rows_of_their_batch_are(records, download, monkeypatch):
  """Or hosts that share a clip elsewhere, and not there, would give captions of different clips for one row."""
  made_of = config(records, download, "tiny_wan", mesh__replica=2, mesh__fsdp=1, mesh__seq=4,
                   data__buckets="9x32x48@8/1,5x32x48@4/2,1x32x48@2")
  made, seen, through = parts.assemble(made_of), [], text.rows.through
  captions = encoders.captions(made_of, made.mesh, made.size)
  monkeypatch.setattr(text.rows, "through", lambda mesh, *rest: seen.append(mesh) or through(mesh, *rest))
  told = [f"a {word}" for word in ("cat", "dog", "fox", "hen", "owl", "pig", "rat", "yak")]
  wanted = captions(told)
  for bucket in made.buckets:
    there = made.of(bucket)
    placed = parts.to_devices(there, captions, {"caption": told[:bucket.batch]})
    split = [mesh.devices.reshape(bucket.batch, -1).tolist() for mesh in (seen[-1], there.mesh)
             if meshes.batch_shards(mesh) == bucket.batch]
    assert len(split) == 2 and split[0] == split[1]
    assert apart(np.asarray(placed["text"]), wanted[:bucket.batch]) < 1e-5


@pytest.mark.parametrize("blow", ["before a shard", "after a shard"])
def test_what_stops_it_changes_nothing_of_what_it_makes(blow, records, tmp_path, monkeypatch):
  monkeypatch.setattr(encode, "PART", 2)
  plain = tiny.get_config()
  plain.data.records, plain.data.buckets, plain.data.views = str(records), "9x32x48@8,5x32x48@8", 2
  encode.encode(plain, tmp_path / "straight", 8, say=lambda line: None)
  write, calls = shards.write_shard, []

  def failing(path, rows):
    calls.append(path)
    if len(calls) == 3 and blow == "before a shard":
      raise KeyboardInterrupt
    made = write(path, rows)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return made

  monkeypatch.setattr(shards, "write_shard", failing)
  with pytest.raises(KeyboardInterrupt):
    encode.encode(plain, tmp_path / "stopped", 8)
  with pytest.raises(BadInput, match="encoding never finished"):
    latents.Latents(tmp_path / "stopped", "train", Bucket(9, 32, 48, 8))
  said = []
  encode.encode(plain, tmp_path / "stopped", 8, say=said.append)
  assert said[0].startswith("goes on: 2 of ") and contents(tmp_path / "stopped") == contents(tmp_path / "straight")
  again = len(calls)
  encode.encode(plain, tmp_path / "stopped", 8, say=said.append)
  assert said[-1].endswith("is complete already") and len(calls) == again


def test_settings_bind_a_folder_from_its_first_finished_part_on(records, tmp_path):
  mistaken, mended = tiny.get_config(), tiny.get_config()
  for made in (mistaken, mended):
    made.data.records, made.data.buckets = str(records), "9x32x48@8"
  mistaken.data.views = 9
  encode.begin(mistaken, tmp_path / "out", print)
  settings, complete = encode.begin(mended, tmp_path / "out", print)
  assert not complete and json.loads((tmp_path / "out" / encode.SETTINGS).read_text()) == settings
  encode.note_of(tmp_path / "out" / "9x32x48-train-00000.arrayrecord").touch()
  with pytest.raises(BadInput, match=r"holds latents of other settings \(views: 4 -> 9\)"):
    encode.begin(mistaken, tmp_path / "out", print)


def test_an_image_to_video_network_trains_on_latents_the_same_on_every_mesh(encoded, download, tmp_path):
  losses = []
  for number, axes in enumerate([{"fsdp": 8}, {"fsdp": 2, "data": 2, "seq": 2}]):
    made = config(encoded, download, data__encoded=True, train__steps=2, train__held_out=2, train__report=1,
                  optimizer__warmup=1, times__given=1.0, **{f"mesh__{axis}": count for axis, count in axes.items()})
    train.train(made, tmp_path / str(number), say=lambda line: None)
    rows = [json.loads(line) for line in (tmp_path / str(number) / "measures.jsonl").read_text().splitlines()]
    losses.append([row[name] for name in ("loss", "held_out") for row in rows if name in row])
  assert len(losses[0]) == 3 and np.isfinite(losses).all()
  np.testing.assert_allclose(*losses, rtol=2e-4)


def test_a_pack_of_clips_too_short_for_a_bucket_is_left_out_of_it_alone(records, tmp_path):
  other = tmp_path / "short"
  other.mkdir()
  index = json.loads((records / "index.json").read_text())
  (other / "index.json").write_text(json.dumps({**index, "clip_seconds": 0.5}))
  for file in records.glob("*.arrayrecord"):
    shutil.copy(file, other)
  plain = tiny.get_config()
  plain.data.records, plain.data.buckets = f"{records},{other}", "9x32x48@8,5x32x48@8"
  found = encode.jobs(plain, tmp_path / "out")
  assert [(job.bucket.frames, [source.seconds for source in job.sources]) for job in found] == 2 * [
    (9, [1.7]), (5, [1.7, 0.5])]


def test_windows_of_all_sources_have_numbers_of_their_own_that_devices_know(records):
  """Of two sources of two million clips each, which are one clip."""
  class Many(tfds.TfdsClips):
    name, seconds = "many", None
    def __init__(self):
      pass
    def __len__(self):
      return 2_000_000
    def __getitem__(self, number):
      return tfds.Pixels(f"many/{number}", "", None, [np.zeros((8, 8, 3), np.uint8)] * 9)

  bucket = Bucket(3, 8, 8, 1)
  found = [window for number in (0, 1_999_999, 2_000_000, 3_999_999)
           for window in encode.windows([Many(), Many()], bucket, Deal((bucket,)), 12.0, number)]
  numbers = {window.number for window in found}
  assert len(found) == len(numbers) == 4 * 3 and min(numbers) >= 0 and max(numbers) < 2**31
  assert {window.clip.id for window in found} == {"many/0", "many/1999999"}


def test_a_folder_begun_when_each_source_had_numbers_from_0_does_not_go_on_with_others(records, tmp_path):
  plain = tiny.get_config()
  plain.data.records, plain.data.buckets = str(records), "9x32x48@8"
  before = encode.settings_of(plain)
  assert "numbers" not in before  # those of one source are as they were
  plain.data.records = f"{records},{records}"
  (tmp_path / encode.SETTINGS).write_text(json.dumps({**before, "records": 2 * before["records"]}))
  encode.note_of(tmp_path / "9x32x48-train-00000.arrayrecord").touch()
  with pytest.raises(BadInput, match='numbers: absent -> "over all sources"'):
    encode.begin(plain, tmp_path, print)


def test_one_bad_clip_is_left_out_and_named(records, tmp_path, capsys):
  folder = shutil.copytree(records, tmp_path / "records")
  clips = Records(folder, "train")
  rows = [shards.to_bytes(clips[number]) for number in range(len(clips))]
  rows[1] = rows[1][:-900]
  index = json.loads((folder / "index.json").read_text())
  index["splits"]["train"]["shards"] = [shards.write_shard(folder / "train-new.arrayrecord", rows)]
  (folder / "index.json").write_text(json.dumps(index))
  plain = tiny.get_config()
  plain.data.records, plain.data.buckets = str(folder), "9x32x48@8"
  said = []
  encode.encode(plain, tmp_path / "out", 8, say=said.append)
  assert f"{2 * (len(clips) - 1)} clips to train on" in said[-1] and "1 left out" in said[-1]
  assert "record 1" in capsys.readouterr().out


def wrong(case: str, records: Path, encoded: Path, download, tmp_path: Path) -> None:
  said = {"say": lambda line: None}
  if case == "another task mix":
    train.train(config(encoded, download, data__encoded=True, tasks__first=0.9), tmp_path / "run", **said)
  elif case == "pixels of another scale":
    made = tiny.get_config()
    made.update({"data": {"records": str(records), "buckets": "9x32x48@8", "views": 1}})
    encode.encode(made, tmp_path / "latents", 8, **said)
    made.update({"data": {"records": str(tmp_path / "latents"), "encoded": True}, "codec": {"scale": 1.0}})
    train.train(made, tmp_path / "run", **said)
  elif case == "clips for latents":
    train.train(config(records, download, "tiny_wan", data__encoded=True), tmp_path / "run", **said)
  elif case == "latents for clips":
    train.train(config(encoded, download, "tiny_wan"), tmp_path / "run", **said)
  elif case == "image tokens from clips":
    train.train(config(records, download), tmp_path / "run", **said)
  elif case == "another bucket":
    train.train(config(encoded, download, data__encoded=True, data__buckets="5x32x48@8"), tmp_path / "run", **said)
  elif case == "another number of views":
    encode.encode(config(records, download, data__views=3), encoded, 8)
  elif case == "conditions dropped twice":
    encode.encode(config(records, download, loss__drop_condition=2.0), tmp_path / "out", 8)
  elif case == "latents again":
    encode.encode(config(encoded, download), tmp_path / "out", 8)
  elif case == "weights that are not there":
    encode.encode(config(records, download, codec__weights="nowhere.pth"), tmp_path / "out", 8)
  elif case == "no weights":
    made = config(records, download)
    made.pretrained = ""
    encode.encode(made, tmp_path / "out", 8)
  elif case == "a download without a VAE":
    lacking = shutil.copytree(download[0], tmp_path / "lacking")
    shutil.rmtree(lacking / "vae")
    encode.encode(config(records, (lacking,)), tmp_path / "out", 8)
  elif case == "a batch of 3":
    encode.encode(config(records, download), tmp_path / "out", 3)
  elif case == "longer than the clips":
    encode.encode(config(records, download, data__buckets="49x32x48@8"), tmp_path / "out", 8)
  elif case == "a text encoder of another width":
    with patch.dict(TEXT_SIZES, {"wide": replace(published.TEXT, width=32)}):
      encode.encode(config(records, download, text__name="wide"), tmp_path / "out", 8)


WRONG = {
  "another task mix": "was encoded with other settings (tasks.first: 0.25 -> 0.9)",
  "pixels of another scale": "was encoded with other settings (codec settings.scale: 4.0 -> 1.0)",
  "clips for latents": "holds clips and data.encoded is True: make latents of them with encode",
  "latents for clips": "holds latents and data.encoded is False: set --config.data.encoded=True",
  "image tokens from clips": "reads image tokens, which training does not make",
  "another bucket": "holds latents of 9x32x48 and bucket 5x32x48@8:1 is none of them",
  "another number of views": "holds latents of other settings (views: 2 -> 3)",
  "conditions dropped twice": "drop_condition = 2.0 is no share: take 0 .. 1",
  "latents again": "holds latents already",
  "weights that are not there": "codec.weights nowhere.pth does not exist: give --config.codec.weights=PATH",
  "no weights": "give --config.codec.weights=PATH, or --config.pretrained=FOLDER",
  "a download without a VAE": "holds none of Wan2.1_VAE.pth, Wan2.2_VAE.pth, vae",
  "a batch of 3": "does not divide by the 8 devices",
  "longer than the clips": "take fewer frames",
  "a text encoder of another width": "makes tokens of width 32 and model size 'tiny_wan_i2v' reads 24",
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(case, records, encoded, download, tmp_path, capsys):
  assert errors.run(lambda: wrong(case, records, encoded, download, tmp_path)) == 2
  lines = capsys.readouterr().err.splitlines()
  assert lines[-1].startswith("error: ") and WRONG[case] in lines[-1], lines
  assert not (tmp_path / "run" / "config.json").exists() and not list(tmp_path.glob("out/*record*"))


def test_the_entry_point_goes_on_after_a_kill_and_what_it_made_trains(records, tmp_path):
  run = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, timeout=300)
  command = [sys.executable, "-m", "anisora_jax.encode", "--config=configs/tiny.py", "--cpu_devices=2",
             f"--config.data.records={records}", "--config.data.buckets=9x32x48@8", f"--out={tmp_path / 'latents'}"]
  explained = run([*command, "--help"]).stdout
  assert all(word in explained for word in ("--batch", "--out", "goes on"))
  killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  while killed.poll() is None and not (tmp_path / "latents" / encode.SETTINGS).exists():
    time.sleep(0.02)
  killed.send_signal(signal.SIGKILL)
  killed.wait()
  assert not (tmp_path / "latents" / latents.INDEX).exists()
  done = run(command)
  assert done.returncode == 0 and "clips to train on" in done.stdout, done.stderr
  trained = run([sys.executable, "-m", "anisora_jax.train", "--config=configs/tiny.py", "--cpu_devices=2",
                 f"--config.data.records={tmp_path / 'latents'}", "--config.data.encoded=True",
                 "--config.data.buckets=9x32x48@8", "--config.train.steps=2", "--config.optimizer.warmup=1",
                 f"--workdir={tmp_path / 'run'}"])
  assert trained.returncode == 0 and "trained 2 steps" in trained.stdout, trained.stderr
