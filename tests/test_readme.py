"""The README's commands name programs, flags, fields and files that exist."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "configs").glob("*.py")), *sorted((ROOT / "anisora_jax").glob("*.py"))]


def commands(text: str) -> list[list[str]]:
  """Every line that starts with "python", its continuations joined; what a column explains behind it is left out."""
  joined = re.sub(r"\\+\n\s*", "", text)
  lines = [line.strip() for line in joined.splitlines() if re.match(r"\s*python (-m anisora_jax|\w+/)", line)]
  return [shlex.split(re.split(r"\s{3,}", line)[0]) for line in lines]


COMMANDS = sorted({tuple(command) for path in TEXTS for command in commands(path.read_text())})


@cache
def help_of(*program: str) -> str:
  done = subprocess.run([sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
  return done.stdout


def fields(config: ConfigDict, start: str = "config.") -> set[str]:
  return {name for key, value in config.items()
          for name in (fields(value, f"{start}{key}.") if isinstance(value, ConfigDict) else {start + key})}


def test_the_readme_and_the_recipes_show_commands():
  assert len(COMMANDS) > 30


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_names_what_there_is(command):
  program = command[1:3] if command[1] == "-m" else command[1:2]
  known = set(re.findall(r"--(?:\[no\])?([\w.]+)", help_of(*program))) | fields(base.get_config())
  for word in command[1 + len(program):]:
    if word.startswith("--"):
      assert word[2:].split("=")[0] in known, word
    if re.match(r"configs/\w+\.py", word):
      assert (ROOT / word.split(":")[0]).is_file(), word
  assert (ROOT / program[-1]).is_file() or (ROOT / f"{program[-1].replace('.', '/')}.py").is_file()
