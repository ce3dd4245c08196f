"""Imports go down only, packages of one layer do not know each other, and no file, function or signature grows long."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "anisora_jax"
LAYER = {
  "shapes": 0, "keys": 0, "errors": 0,
  "parallel": 1,
  "models": 2, "diffusion": 2, "tasks": 2, "loaders": 2, "checkpoints": 2, "adapters": 2,
  "training": 3, "sampling": 3, "evaluation": 3, "planning": 3,
  "experiment": 4, "entry": 4,
  "train": 5, "sample": 5, "encode": 5, "convert": 5, "evaluate": 5, "plan": 5,
}
LONG = {}  # path or path:function -> reason; may only shrink
FILES = sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "data").glob("*.py")) + sorted((ROOT / "launch").glob("*.py"))


def imports_of(source: str) -> set[str]:
  """The parts of anisora_jax that a file imports, wherever in the file the import stands."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return {name.split(".")[1] for name in names if name.startswith("anisora_jax.")}


def breaches(part: str, imported: set[str]) -> set[str]:
  """Which imports of a part climb, or reach a neighbour of its own layer (ground files may use each other)."""
  above = {name for name in imported if LAYER[name] > LAYER[part]}
  beside = {name for name in imported if name != part and LAYER[name] == LAYER[part] and LAYER[part] != 0}
  return above | beside


def part_of(path: Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", [p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"],
                         ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
  assert not breaches(part_of(path), imports_of(path.read_text()))


def test_the_layer_rule_sees_a_climb_and_a_neighbour():
  inside = "def f():\n  from anisora_jax.training import step\n"
  assert breaches("models", imports_of(inside)) == {"training"}
  assert breaches("models", imports_of("import anisora_jax.diffusion.path")) == {"diffusion"}
  assert not breaches("training", imports_of("from anisora_jax import keys\nfrom anisora_jax.models import rope"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_functions_and_signatures_stay_short(path):
  text, name = path.read_text(), str(path.relative_to(ROOT))
  assert text.count("\n") <= 400 or name in LONG
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef):
      arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
      arguments = [a for a in arguments if a.arg not in ("self", "cls")]
      long = node.end_lineno - node.lineno >= 60 or len(arguments) > 7
      assert not long or f"{name}:{node.name}" in LONG, f"{name}:{node.name}"


def test_only_the_assembly_reads_configs_and_only_the_mesh_asks_for_devices():
  for path in PACKAGE.rglob("*.py"):
    name, text = str(path.relative_to(PACKAGE)), path.read_text()
    assert "ConfigDict" not in text or part_of(path) == "experiment", name
    assert "jax.devices(" not in text or name == "parallel/mesh.py", name
