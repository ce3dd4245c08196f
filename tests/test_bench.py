"""Benchmarks run, at their smallest: what they call changes, and people run them seldom."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from drawn import packed

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
  return packed(tmp_path_factory.mktemp("drawn"))


LONG = ("step.py --frames 1 --height 8 --width 12 --rounds 1 --batch 1 --notorch_compile",
        "vae.py --frames 1 --height 16 --width 16 --rounds 1",
        "curate.py --seconds 3 --height 96 --long 10 --films 2 --nowarm")


@pytest.mark.parametrize("command", [
  "attention.py --lengths 64 --rounds 1", "attention.py --ring --lengths 64 --rounds 1", "checkpoint.py --steps 8",
  "card.py --try --lengths 64 --heads 2 --head_width 16 --exact 64 --rounds 1",
  "loader.py --records {records} --bucket 5x16x24@2 --rounds 2",
  *(pytest.param(command, marks=pytest.mark.product) for command in LONG)])
def test_a_benchmark_says_what_it_measured(command, records):
  words = shlex.split(f"bench/{command}".replace("{records}", str(records)))
  done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  assert any(unit in done.stdout for unit in ("ms", " s", "clips/s")), done.stdout
