"""Batches as large as a budget of tokens allows; and whole runs of clips that share rows or are assigned to buckets."""

import json

import numpy as np
import pytest
from drawn import packed

from anisora_jax.errors import BadInput
from anisora_jax.experiment import advised, encode, parts, train
from anisora_jax.loaders import latents
from anisora_jax.planning import advice
from anisora_jax.training import report
from configs import tiny


def config(**changes):
  made = tiny.get_config()
  made.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return made


def assembled(devices=8, **changes):
  return parts.assemble(config(**changes), count=devices)


CLIP = 5 * 8 * 12 // 4  # tokens of 5x16x24


@pytest.mark.parametrize(("devices", "bucket", "tokens", "micro_batches", "batch"), [
  (1, "5x16x24", 7 * CLIP, 1, 7), (1, "5x16x24", 8 * CLIP - 1, 1, 7), (1, "5x16x24", 7 * CLIP, 2, 6),
  (8, "5x16x24", 17 * CLIP, 1, 16), (8, "5x16x24/2", 15 * CLIP, 1, 12), (8, "5x16x24@24", CLIP, 1, 24),
  (8, "5x16x24/8:2", 5 * CLIP, 1, 5)])
def test_the_batch_is_the_largest_that_fits_and_divides(devices, bucket, tokens, micro_batches, batch):
  made = assembled(devices, data__buckets=bucket, data__tokens=tokens, train__micro_batches=micro_batches)
  assert made.buckets[0].batch == batch and made.frame_tokens(made.buckets[0]) == (5, CLIP // 5)
  lines = parts.budget(made, config(data__buckets=bucket, data__tokens=tokens))
  assert len(lines) == ("@" not in bucket)
  assert all(f"batches of {batch} clips of {CLIP} tokens, {batch * CLIP:,} of the {tokens:,}" in line for line in lines)


@pytest.mark.parametrize(("changes", "words"), [
  ({"data__tokens": 8 * CLIP - 1}, "the smallest batch, 8 clips as replica x data x fsdp x micro_batches ask, is 960 "
                                   "tokens, and data.tokens is 959: .* as 5x16x24/2 says"),
  ({}, "has no batch: write ...@BATCH, as in 9x32x48@16, or give --config.data.tokens"),
  ({"data__tokens": 10**6, "data__packed": 2}, "data.packed is 2 and records hold clips"),
  ({"data__tokens": 10**6, "data__packed": 2, "data__encoded": True, "model__mask": "window:2+globals:2"},
   "its global frames are those of a row and not of a clip"),
  ({"data__tokens": 10**6, "data__assign": "best"}, "assignment of records")])
def test_what_no_batch_fits_is_one_clear_line(changes, words, tmp_path):
  with pytest.raises(BadInput, match=words) as error:
    made = assembled(data__buckets="5x16x24", **changes)
    parts.loader(made, config(data__buckets="5x16x24", data__records=str(tmp_path), **changes), "train")
  assert "\n" not in str(error.value)


def test_a_dry_run_advises_how_to_split_where_speeds_are_known(monkeypatch):
  changes = {"data__buckets": "5x16x24/8,9x16x24@8", "data__tokens": 40 * CLIP, "mesh__fsdp": 8}
  made, told = assembled(8, **changes), config(**changes)
  assert advised.lines(made, told) == []  # a CPU's are not
  monkeypatch.setitem(report.PEAKS, "cpu", 1e12)
  monkeypatch.setitem(advice.LINKS, "cpu", 1e9)
  lines = advised.lines(made, told)
  assert lines[0].startswith("5x16x24: better @40/1, where devices idle ")
  assert lines[1].startswith("9x16x24: as it is, devices idle ") and lines[2].startswith("were clips of all buckets")
  short = advised.clips(made, made.buckets[0], 6 * CLIP)
  assert short == advice.Clips("5x16x24", CLIP, 8, {2: 4, 4: 6, 8: 40})  # so few clips are too few for 8 groups


# whole runs


@pytest.fixture(scope="module")
def records(tmp_path_factory):
  return packed(tmp_path_factory.mktemp("drawn"))


SIZES = "9x16x24@8,5x16x24@8,1x16x24@8"


@pytest.fixture(scope="module")
def encoded(records, tmp_path_factory):
  out = tmp_path_factory.mktemp("encoded") / "latents"
  encode.encode(config(data__records=str(records), data__buckets=SIZES), out, 8, say=lambda line: None)
  return out


def run(folder, steps, **changes):
  """Trains in this process; returns what was said and measured."""
  lines = []
  made = config(train__steps=steps, train__report=1, train__checkpoint=0, train__held_out=0, optimizer__warmup=1,
                mesh__fsdp=2, mesh__seq=4, **changes)
  train.train(made, folder, lines.append)
  return lines, [json.loads(line) for line in (folder / "measures.jsonl").read_text().splitlines()]


def test_a_run_of_clips_that_share_rows_trains_on_batches_of_the_budget(encoded, tmp_path):
  changes = {"data__records": str(encoded), "data__encoded": True, "data__packed": 3, "data__buckets": "9x16x24",
             "data__tokens": 5 * 9 * 24, "text__name": "words"}
  lines, rows = run(tmp_path / "run", 2, **changes)
  assert any("bucket 9x16x24:1: batches of 4 clips of 216 tokens, 864 of the 1,080" in line for line in lines)
  losses = [row["loss"] for row in rows if "loss" in row]
  assert len(losses) == 2 and np.isfinite(losses).all() and min(losses) > 0
  assert len({row["records"] for row in rows if "loss" in row}) == 2


def test_the_step_of_packed_rows_is_the_one_that_is_accounted_for(encoded):
  """Shapes that dry runs compile for are those that the loader makes."""
  told = {"data__records": str(encoded), "data__encoded": True, "data__packed": 3, "data__buckets": "9x16x24@8"}
  made = assembled(1, **told)
  batch = next(parts.loader(made, config(**told), "train"))
  placed, wanted = parts.to_devices(made, None, batch), train.abstract_batch(made, made.buckets[0])
  assert {name: (x.shape, x.dtype) for name, x in placed.items()} == {
    name: (x.shape, x.dtype) for name, x in wanted.items()}
  tokens, flops = train._work(made, batch)
  assert tokens == (batch["segment"] >= 0).sum() * 24 < 8 * 9 * 24
  assert flops < made.work(made.buckets[0])[1]


def test_clips_that_were_encoded_in_every_size_are_not_assigned_to_one(encoded):
  told = config(data__records=str(encoded), data__encoded=True, data__buckets=SIZES, data__assign="fit")
  with pytest.raises(BadInput, match=r"was encoded with data\.assign=any, each clip in every size"):
    encode.empty_text(parts.assemble(told), told)


def test_encoding_assigns_each_clip_to_one_size(records, tmp_path):
  out = tmp_path / "latents"
  encode.encode(config(data__records=str(records), data__buckets="5x16x24@8,9x16x24@8,9x24x16@8", data__assign="fit"),
                out, 8, say=lambda line: None)
  sizes = latents.read_index(out)["sizes"]
  counts = {name: sum(shard["records"] for split in about["splits"].values() for shard in split)
            for name, about in sizes.items()}
  assert counts["9x16x24"] > 0 and counts["5x16x24"] == counts["9x24x16"] == 0  # all are wide, and long enough
