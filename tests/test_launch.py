"""Launchers do what they say: they run against commands that only write down how they were called, and the notebook
runs as it is."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from unittest.mock import NonCallableMock as Mock

import jax
import numpy as np
import pytest
import yaml
from absl import flags

from anisora_jax import train
from anisora_jax.checkpoints.workdir import flatten
from anisora_jax.experiment import parts
from anisora_jax.models.kernels import LOCAL
from configs import tiny

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
STUB = """#!{python}
import json, os, sys
name = os.path.basename(sys.argv[0])
with open({calls!r}, "a") as file:
  file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if status := int(os.environ.get("STATUS_" + name, 0)):
  sys.exit(status)
"""


class Stubs:
  """Commands that only write down how they were called; STATUS_name in the environment is what one exits with."""

  def __init__(self, folder: Path, *names: str):
    self.folder, self.calls = folder / "bin", folder / "calls.jsonl"
    self.folder.mkdir()
    self.calls.touch()
    for name in names:
      self.write(name, STUB.format(python=sys.executable, calls=str(self.calls)))

  def write(self, name: str, text: str) -> None:
    (self.folder / name).write_text(text)
    (self.folder / name).chmod(0o755)

  def run(self, script: str, *words: str, **environ: str) -> tuple[int, list[list[str]]]:
    """(status of a launcher, what it called)."""
    path = f"{self.folder}:{os.environ['PATH']}"
    done = subprocess.run(["bash", LAUNCH / script, *words], cwd=ROOT, env={"PATH": path, **environ}, timeout=120,
                          capture_output=True, text=True)
    called = [json.loads(line) for line in self.calls.read_text().splitlines()]
    self.calls.write_text("")
    return done.returncode, called


def understood(words: list[str]) -> dict[str, str]:
  """The flags of a call of anisora_jax.train, each of which that program must know, with their values."""
  words, found = words[words.index("anisora_jax.train") + 1:], {}
  while words:
    name, equals, value = words.pop(0).removeprefix("--").partition("=")
    found[name] = value if equals else words.pop(0)
  fields = {f"config.{name}" for name in flatten(tiny.get_config().to_dict())}
  assert not set(found) - set(flags.FLAGS) - fields
  assert (ROOT / found["config"]).is_file() and train.WORKDIR.name in found
  return found


def tpus(*sides: int) -> list[Mock]:
  """The chips of a slice of v5p, as far as a mesh asks for them."""
  places = [place[::-1] for place in np.ndindex(sides[::-1])]
  return [Mock(jax.Device, id=n, platform="tpu", device_kind="TPU v5", process_index=n // 4, core_on_chip=0,
               coords=place) for n, place in enumerate(places)]


def cards(count: int) -> list[Mock]:
  return [Mock(jax.Device, id=n, platform="gpu", device_kind="NVIDIA H200", process_index=n // 8) for n in range(count)]


def fits(words: list[str], *machines: list[Mock]) -> None:
  """Whether a call of anisora_jax.train starts on these devices, and from weights that someone trained."""
  said = understood(words)
  config = importlib.import_module(said["config"].removesuffix(".py").replace("/", ".")).get_config()
  fields = flatten(config.to_dict())
  config.update_from_flattened_dict({name: type(fields[name])(value) for name, value in (
    (flag.removeprefix("config."), value) for flag, value in said.items()) if name in fields})
  for devices in machines:
    made = parts.assemble(config, devices=devices)
    assert made.mesh.size == len(devices) and made.buckets[0].batch and parts.abstract_params(made)
  assert config.pretrained and config.data.encoded


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_shell(script):
  subprocess.run(["bash", "-n", script], check=True)
  checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
  done = subprocess.run([checker, script], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
  assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_a_user_edits_stands_in_three_lines(script):
  lines = script.read_text().splitlines()
  begin = lines.index("set -euo pipefail") + 1
  edited = [number for number, line in enumerate(lines) if line.startswith(': "${')]
  assert edited == [begin, begin + 1, begin + 2]


def test_local_trains(tmp_path):
  status, ((name, *words),) = Stubs(tmp_path, "python").run("local.sh", "--config.train.steps=7", RECORDS="/r")
  assert (status, name) == (0, "python")
  assert understood(words) == {"config": "configs/toons.py", "config.data.records": "/r", "workdir": "out/run",
                               "config.train.steps": "7"}


def test_slurm_starts_on_the_nodes_it_asks_for_and_on_more(tmp_path):
  _, ((_, *words),) = Stubs(tmp_path, "srun").run("slurm.sh", SLURM_JOB_ID="4711")
  asked = dict(word.removeprefix("--").split("=") for word in asked_of_slurm() if "=" in word and "@" not in word)
  nodes, each = int(asked["nodes"]), int(asked["gpus-per-node"])
  fits(words, cards(nodes * each), cards(each), cards(256))


@pytest.mark.parametrize("status, again", [(0, False), (75, True), (2, False), (137, False)])
def test_slurm_starts_a_process_a_node_and_queues_again_what_was_stopped(status, again, tmp_path):
  stubs = Stubs(tmp_path, "srun", "scontrol")
  ended, ((name, *words), *rest) = stubs.run("slurm.sh", "--config.train.steps=7", SLURM_JOB_ID="4711",
                                             WORKDIR="/w", STATUS_srun=str(status))
  assert (ended, name) == (status, "srun") and words[1:5] == ["python", "-u", "-m", "anisora_jax.train"]
  assert understood(words)["stopped_status"] == "75" and understood(words)["workdir"] == "/w"
  assert rest == ([["scontrol", "requeue", "4711"]] if again else [])


def asked_of_slurm() -> list[str]:
  """The words of the job's #SBATCH lines."""
  lines = (LAUNCH / "slurm.sh").read_text().splitlines()
  return [word for line in lines if line.startswith("#SBATCH ") for word in line.split()[1:]]


def test_slurm_asks_for_a_node_s_devices_and_for_time_to_save():
  lines = (LAUNCH / "slurm.sh").read_text().splitlines()
  first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
  asked = asked_of_slurm()
  assert {"--ntasks-per-node=1", "--requeue", "--open-mode=append", "--signal=TERM@600"} <= set(asked)
  assert not any(line.startswith("#SBATCH") for line in lines[first:])  # sbatch would not read them


GCLOUD = """#!{python}
import json, os, shutil, subprocess, sys
from pathlib import Path
with open({calls!r}, "a") as file:
  file.write(json.dumps(sys.argv[1:]) + "\\n")
words = sys.argv[4:]
said = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
homes = [Path({homes!r}) / n for n in (["0", "1"] if said["worker"] == "all" else [said["worker"]])]
assert said["zone"] == "z" and sys.argv[1:4] == ["compute", "tpus", "tpu-vm"]
for home in homes:
  home.mkdir(parents=True, exist_ok=True)
  if words[0] == "scp":
    shutil.copy(words[1], home / words[2].split(":")[1])
  else:
    subprocess.run(["bash", "-c", said["command"]], cwd=home, env={{**os.environ, "HOME": str(home)}}, check=True)
"""
VENV = """#!/bin/bash
if [ "$1" = -m ] && [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit; fi
printf '%s\\n' "$*" >>"$HOME/called"
case "$*" in *anisora_jax.train*) ;; *) exit;; esac
trap 'echo saved; exit 75' TERM
echo step
for _ in {1..900}; do sleep 0.05; done
"""


def test_tpu_vm_starts_every_worker_once_and_goes_on_with_the_same_command(tmp_path):
  stubs, homes = Stubs(tmp_path, "mountpoint"), tmp_path / "homes"
  stubs.write("gcloud", GCLOUD.format(python=sys.executable, calls=str(stubs.calls), homes=str(homes)))
  stubs.write("python3.12", "#!/bin/bash\nexit 1\n")  # of a version manager that has none
  stubs.write("python3.11", "#!/bin/bash\nexit 1\n")  # without venv
  stubs.write("python3", "#!/bin/bash\nexit 1\n")  # too old
  stubs.write("venv", VENV)
  stubs.write("sudo", STUB.format(python=sys.executable, calls=str(stubs.calls)) + f"""
if sys.argv[1:3] == ["apt-get", "install"]:
  os.replace({str(stubs.folder / "venv")!r}, {str(stubs.folder / "python3.11")!r})
""")
  started = []
  for _ in range(2):
    start = subprocess.Popen(["bash", LAUNCH / "tpu_vm.sh", "--config.train.steps=7"], cwd=ROOT, text=True, env={
      "PATH": f"{stubs.folder}:{os.environ['PATH']}", "ZONE": "z", "STATUS_mountpoint": "1", "TMPDIR": str(tmp_path)},
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    started.append(start)
    while start.poll() is None and sum("tail" in line for line in stubs.calls.read_text().splitlines()) < len(started):
      time.sleep(0.05)
    assert start.poll() is None, start.communicate()[0]
  stopped, called = stubs.run("tpu_vm.sh", "stop", ZONE="z")
  assert stopped == 0 and all("saved" in start.communicate(timeout=60)[0] for start in started)
  assert called.count(["sudo", "apt-get", "install", "-qy", "python3.11-venv"]) == 1
  assert ["sudo", "mount", "-t", "nfs", "10.0.0.2:/share", "/mnt/anisora"] in called
  for worker in ("0", "1"):
    assert (homes / worker / "anisora" / "anisora_jax" / "train.py").is_file()
    calls = (homes / worker / "called").read_text().splitlines()
    (words,) = [line.split() for line in calls if "anisora_jax.train" in line]  # the second start found it alive
    assert understood(words)["workdir"] == "/mnt/anisora/run" and understood(words)["config.train.steps"] == "7"
    assert LOCAL[understood(words)["config.model.kernel"]].platform == "tpu"
    assert (homes / worker / "anisora" / "train.log").read_text().split() == ["step", "saved"]
    fits(words, tpus(2, 2, 2), tpus(2, 2, 4), tpus(4, 4, 4))
  assert not list(tmp_path.glob("tmp.*"))  # the tree that was sent


def test_a_quickstart_that_was_stopped_early_and_killed_later_has_gone_on_exactly(tmp_path):
  measures = tmp_path / "measures.jsonl"

  def check(*runs: dict[int, float]) -> tuple[int, str]:
    rows = [row for run in runs for row in ({"start": 0}, *({"step": step, "loss": loss, "grad_norm": 1., "records": []}
                                                            for step, loss in run.items()))]
    measures.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = f"import quickstart, pathlib; quickstart.check_resume(pathlib.Path({str(measures)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=LAUNCH, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr

  first, second, third = (dict.fromkeys(range(*steps), .5) for steps in ((1, 41), (41, 57), (51, 99)))
  status, said = check(first, second, third)
  assert status == 0 and "steps 51 to 56 were done twice" in said
  assert check(first, second, third | {53: .41})[0] == check(first, second)[0] == 1


# Of the JobSet v1alpha2 and the Kubernetes batch/v1 and core/v1 references: the fields that there are, of those a
# training job needs, with their types; * must be there.
SCHEMA = {
  "apiVersion*": str, "kind*": str, "metadata*": {"name*": str, "annotations": {"": str}},
  "spec*": {
    "failurePolicy": {"maxRestarts": int, "restartStrategy": str, "rules": [
      {"name*": str, "action*": str, "onJobFailureReasons": [str], "targetReplicatedJobs": [str]}]},
    "successPolicy": {"operator*": str, "targetReplicatedJobs": [str]},
    "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
    "coordinator": {"replicatedJob*": str, "jobIndex": int, "podIndex": int},
    "suspend": bool, "ttlSecondsAfterFinished": int,
    "replicatedJobs*": [{"name*": str, "replicas": int, "template*": {"spec*": {
      "completions": int, "parallelism": int, "completionMode": str, "backoffLimit": int, "activeDeadlineSeconds": int,
      "podFailurePolicy": {"rules*": [{
        "action*": str, "onExitCodes": {"containerName": str, "operator*": str, "values*": [int]},
        "onPodConditions": [{"type*": str, "status*": str}]}]},
      "template*": {"spec*": {
        "restartPolicy": str, "terminationGracePeriodSeconds": int, "nodeSelector": {"": str},
        "containers*": [{
          "name*": str, "image": str, "command": [str], "args": [str], "env": [{"name*": str, "value": str}],
          "workingDir": str, "resources": {"limits": {"": int}, "requests": {"": int}},
          "volumeMounts": [{"name*": str, "mountPath*": str}]}],
        "volumes": [{"name*": str, "persistentVolumeClaim": {"claimName*": str}}]}}}}}]}}


def misfits(found, schema, path: str = "") -> list[str]:
  """Where a manifest is not of a schema."""
  if isinstance(schema, list):
    return [f"{path} is no list"] if not isinstance(found, list) else [
      wrong for number, one in enumerate(found) for wrong in misfits(one, schema[0], f"{path}[{number}]")]
  if not isinstance(schema, dict):
    return [] if type(found) is schema else [f"{path} is {found!r}"]
  if not isinstance(found, dict):
    return [f"{path} is no map"]
  known = {name.rstrip("*"): one for name, one in schema.items()}
  lacking = [f"{path} lacks {name}" for name in schema if name.endswith("*") and name[:-1] not in found]
  return lacking + [wrong for name, one in found.items() for wrong in (
    misfits(one, known.get(name, known.get("")), f"{path}.{name}") if name in known or "" in known
    else [f"{path}.{name} is unknown"])]


def test_the_manifest_is_a_jobset_that_goes_on_when_it_was_stopped():
  text = (LAUNCH / "gke.yaml").read_text()
  made = yaml.safe_load(text)
  assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet") and not misfits(made, SCHEMA)
  policy, (group,) = made["spec"]["failurePolicy"], made["spec"]["replicatedJobs"]
  job = group["template"]["spec"]
  pod = job["template"]["spec"]
  (container,), edited = pod["containers"], [line.split()[0] for line in text.splitlines() if "# edit" in line]
  assert edited == ["completions:", "cloud.google.com/gke-tpu-topology:", "image:"]
  x, y, z = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
  assert job["completions"] == job["parallelism"] == x * y * z // container["resources"]["limits"]["google.com/tpu"]
  # A pod that was stopped or preempted fails its job, and the set starts again as often as that happens.
  said = understood([*container["command"], *container["args"]])
  fits([*container["command"], *container["args"]], tpus(x, y, z), tpus(4, 4, 4))
  assert LOCAL[said["config.model.kernel"]].platform == "tpu"
  assert {"action": "FailJob", "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [
    int(said["stopped_status"])]}} in job["podFailurePolicy"]["rules"]
  assert {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]} in (
    job["podFailurePolicy"]["rules"])
  assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
  assert policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
  # What Kubernetes demands of a job with a pod failure policy.
  assert (pod["restartPolicy"], job["completionMode"], job["backoffLimit"]) == ("Never", "Indexed", 0)


@pytest.mark.parametrize("change, said", [
  (lambda made: made["spec"].update(restarts=3), ".spec.restarts is unknown"),
  (lambda made: made["metadata"].update(annotations={"hosts": 4}), ".metadata.annotations.hosts is 4"),
  (lambda made: made["spec"]["failurePolicy"]["rules"][0].pop("action"), ".spec.failurePolicy.rules[0] lacks action*"),
  (lambda made: made["spec"]["replicatedJobs"][0].update(replicas="1"), ".spec.replicatedJobs[0].replicas is '1'")])
def test_a_manifest_that_is_none_is_seen(change, said):
  made = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
  change(made)
  assert misfits(made, SCHEMA) == [said]


def cells() -> list[str]:
  notebook = json.loads((LAUNCH / "colab.ipynb").read_text())
  assert notebook["nbformat"] == 4 and all(not cell.get("outputs") for cell in notebook["cells"])
  return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_draws_trains_and_shows_a_film(tmp_path, monkeypatch):
  shown, ipython = [], ModuleType("IPython.display")
  ipython.Image, ipython.display = (lambda filename: Path(filename)), shown.append
  monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
  monkeypatch.setitem(sys.modules, "IPython.display", ipython)
  monkeypatch.chdir(LAUNCH)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  install, choose, *rest = cells()
  names: dict = {}
  exec(install, names)  # finds itself in the repository
  assert Path.cwd() == ROOT
  exec(choose, names)
  names.update(OUT=str(tmp_path), FILMS=2, STEPS=2)
  for cell in rest:
    exec(cell, names)
  assert [path.suffix for path in shown] == [".gif", ".png"] and all(path.stat().st_size > 1000 for path in shown)


def test_the_notebook_fetches_and_installs_what_is_not_there(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  stubs = Stubs(tmp_path, "pip")
  stubs.write("git", f"#!/bin/bash\necho \"$@\" >>{stubs.calls}\nmkdir -p anisora_jax/launch\n")
  monkeypatch.setenv("PATH", f"{stubs.folder}:{os.environ['PATH']}")
  monkeypatch.setattr(sys, "executable", str(stubs.folder / "pip"))
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  for _ in range(2):
    exec(cells()[0], {})
    assert Path.cwd() == tmp_path / "anisora_jax"
    monkeypatch.chdir(tmp_path)
  clone, *installs = stubs.calls.read_text().splitlines()
  assert clone.startswith("clone --depth=1 https://") and clone.endswith(" anisora_jax")
  extras = ".[data,cuda]" if shutil.which("nvidia-smi") else ".[data]"
  assert [json.loads(line)[1:] for line in installs] == [["-m", "pip", "install", "--quiet", "--editable", extras]] * 2
