"""Curation from end to end: what comes out depends on films and settings, not on who works or what is killed."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import toons
from curation import pipeline, run, settings

from anisora_jax.loaders import records, video
from anisora_jax.loaders.tfds import TfdsClips
from configs import curation

ROOT = Path(__file__).resolve().parents[1]
HEIGHT, WIDTH, FPS, SECONDS = 48, 64, 12, 7


def config(**changes):
  """The default config with other values, for films of thumbnails. changes: STAGE__FIELD=VALUE."""
  made = curation.get_config()
  for name, value in {"keep__rules": (), "pack__shard_megabytes": .01, "pack__held_out": .34, "report__kept": 3,
                      "report__rejected": 3, **changes}.items():
    stage, _, field = name.partition("__")
    made[stage][field] = value
  return settings.read(made)


def curate(films, out, workers=1, runner="FnApiRunner", options="", retry=False, **changes):
  run.curate(str(films), out, config(**changes), pipeline.Runner(runner, workers, options), retry)
  return out


def contents(out: Path) -> dict[str, str]:
  """sha256 of every file that a run ends with."""
  return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
          for path in sorted(out.rglob("*")) if path.is_file() and out / "work" not in path.parents}


def all_clips(folder):
  splits = [records.Records(folder, split) for split in records.SPLITS]
  return [split[number] for split in splits for number in range(len(split))]


def table(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def drawn():
  return [toons.draw_film(seed, seconds=SECONDS, height=HEIGHT, width=WIDTH, fps=FPS) for seed in range(3)]


@pytest.fixture(scope="module")
def films(drawn, tmp_path_factory):
  """Three films of two shots, the last again in a worse copy, and a text that is none."""
  folder = tmp_path_factory.mktemp("films")
  for number, film in enumerate(drawn):
    toons.write_film(folder, f"film-{number}", film)
  (folder / "copy.mp4").write_bytes(video.encode(drawn[2][0], float(FPS), crf=28))
  (folder / "text.mp4").write_text("no film")
  return folder


@pytest.fixture(scope="module")
def curated(films, tmp_path_factory):
  return curate(films, tmp_path_factory.mktemp("curated") / "out")


# what comes out

def test_every_shot_is_a_clip_once_with_its_pixels_caption_mask_and_licence(drawn, curated):
  clips = {clip.id: clip for clip in all_clips(curated)}
  assert len(clips) == sum(len(truth["shots"]) for _, _, truth in drawn)
  for number, (frames, masks, truth) in enumerate(drawn):
    for shot in truth["shots"]:
      clip = next(c for c in clips.values() if c.film == f"film-{number}.mp4" and
                  shot["start"] <= int(c.id.rpartition("/")[2]) < shot["end"])
      first = int(clip.id.rpartition("/")[2])
      assert first + clip.frames <= shot["end"] and clip.frames > .8 * (shot["end"] - shot["start"])
      assert clip.caption.startswith(shot["caption"]) and clip.licence == "CC0-1.0"
      seen, character = clip.look(np.arange(clip.frames), video.Size(HEIGHT, WIDTH))
      apart = (seen.astype(float) - frames[first:first + clip.frames]) @ [.299, .587, .114]
      assert 10 * np.log10(255**2 / (apart**2).mean()) > 33
      assert (character == masks[first:first + clip.frames]).all()


def test_the_index_the_table_and_the_checksums_say_what_lies_there(curated):
  index = records.read_index(curated)
  assert {row["name"] for rows in index["splits"].values() for row in rows} == \
    {path.name for path in curated.glob("*.arrayrecord")} and not list(curated.glob(".*"))
  assert any(len(rows) > 1 for rows in index["splits"].values())
  for row in [row for rows in index["splits"].values() for row in rows]:
    assert hashlib.sha256((curated / row["name"]).read_bytes()).hexdigest() == row["sha256"]
  ids = {split: [records.Records(curated, split)[n].id for n in range(records.count(curated, split))]
         for split in records.SPLITS}
  rows = table(curated / "clips.jsonl")
  assert [row["id"] for row in rows] == ids["train"] + ids["held_out"]
  for row in rows:
    shard, = (r for r in index["splits"][row["split"]] if r["name"] == row["shard"])
    assert 0 <= row["number"] < shard["records"] and row["licence"] == "CC0-1.0"
  assert {row["film"] for row in rows if row["split"] == "train"}.isdisjoint(
    row["film"] for row in rows if row["split"] == "held_out")


def test_what_is_turned_away_is_named_with_its_reason(curated):
  rejected = {(row["film"], row["stage"], row["reason"]) for row in table(curated / "rejected.jsonl")}
  assert ("text.mp4", "probe", "not_a_film") in rejected and ("copy.mp4", "deduplicate", "copy") in rejected
  for row in json.loads((curated / "index.json").read_text())["funnel"].values():
    assert row["in"] == row["out"] + sum(row["why"].values())


def test_tfds_reads_the_same_clips(curated):
  ours = {clip.id: clip for clip in all_clips(curated)}
  builder = tfds.builder_from_directory(str(curated / "tfds/clips/1.0.0"))
  theirs = [row for split in builder.info.splits for row in builder.as_data_source(split)]
  assert len(theirs) == len(ours)
  for row in theirs:
    clip = ours[row["id"].decode()]
    assert (row["mp4"], row["caption"].decode(), row["fps"]) == (clip.mp4, clip.caption, clip.fps)
  for split in records.SPLITS:
    source = TfdsClips(str(curated / "tfds/clips/1.0.0"), split)
    assert sorted(source[n].mp4 for n in range(len(source))) == \
      sorted(records.Records(curated, split)[n].mp4 for n in range(records.count(curated, split)))
