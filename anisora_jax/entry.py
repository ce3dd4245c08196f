"""What the entry points share: flags, --config, --help, simulated devices, processes on many machines, one-line errors
and exit codes."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags, logging
from ml_collections import config_flags

from anisora_jax import errors
from anisora_jax.errors import BadInput, nearest
from anisora_jax.parallel import mesh as meshes
from anisora_jax.parallel import processes

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, for example configs/tiny.py; every field of it is a flag, --config.FIELD=VALUE.")
CPU_DEVICES = flags.DEFINE_integer(
  "cpu_devices", 0, "Simulate so many devices on the CPU, to try a mesh.", lower_bound=0)
DISTRIBUTED = flags.DEFINE_enum(
  "distributed", "auto", ["auto", "off"], "auto: be one of the processes that SLURM's srun, Open MPI, a TPU slice or a "
  "Kubernetes job started with this one; off: run alone.")
MEETING = (  # each may stand in the environment instead
  flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where nothing else tells the processes of each "
                      "other; with the next two. Or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID."),
  flags.DEFINE_integer("processes", None, "How many processes there are.", lower_bound=1),
  flags.DEFINE_integer("process", None, "Which of them this is, 0 .. processes - 1.", lower_bound=0))
NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def config() -> Any:
  """The config named by --config, with its overrides. Raises BadInput when there is none."""
  if CONFIG.value is None:
    raise BadInput("no config was given: add --config configs/tiny.py, or another file of configs/.")
  return CONFIG.value


def needed(flag: str, example: str) -> str:
  """The value of a flag that must be given."""
  value = flags.FLAGS[flag].value
  if not value:
    raise BadInput(f"--{flag} was not given: add for example --{flag} {example}.")
  return value


def _fields(config: Any, prefix: str = "config.") -> list[str]:
  return [name for key, value in config.items()
          for name in (_fields(value, f"{prefix}{key}.") if hasattr(value, "items") else [prefix + key])]


def _parse(arguments: Sequence[str], module: str) -> None:
  """Reads the command line; tells in one line what absl and ml_collections find wrong with it."""
  try:
    rest = flags.FLAGS(list(arguments))
    _fields(CONFIG.value or {})  # a file that could not be loaded says so when it is first read
  except flags.UnrecognizedFlagError as error:
    raise BadInput(_no_flag(error, arguments, module)) from None
  except (AttributeError, KeyError) as error:
    raise BadInput(f"no config field is named {_no_field(arguments) or ' '.join(str(error).split())}") from None
  except (flags.Error, ValueError, TypeError) as error:
    raise BadInput(_last_word(str(error))) from None
  except OSError as error:
    path = re.search(r"Relative path\]:\s+(\S+)", str(error))
    raise BadInput(f"config file {path.group(1) if path else ''} cannot be read: give a file of configs/.") from None
  if len(rest) > 1:
    raise BadInput(f"unexpected words {' '.join(rest[1:])}: flags are written --name value or --name=value.")


def _last_word(text: str) -> str:
  """An error in one line; of one that ml_collections tells with the traceback of a config file, what it ends in."""
  if "Traceback (most recent call last)" not in text:
    return " ".join(text.split())
  kind, _, said = text.strip().splitlines()[-1].partition(": ")
  if kind == "TypeError" and "get_config()" in said:
    return f"the config takes no word after its name ({said}): leave out what stands behind the colon."
  return said if kind == "ValueError" else f"the config file cannot be run: {kind}: {said}"


def _unchanged(arguments: Sequence[str]) -> list[str]:
  """The fields of the config file that a command line names, as it stands there; none where it cannot be loaded."""
  path = re.search(r"\s--?config[=\s](\S+)", " ".join(arguments))
  try:
    return _fields(flags.FLAGS[CONFIG.name].parser.parse(path[1])) if path else []
  except Exception:  # its own message tells of it
    return []


def _no_field(arguments: Sequence[str]) -> str:
  """The first --config.FIELD that the config file has not, and what to do; "" where it has all of them."""
  known = _unchanged(arguments)
  for name in re.findall(r"\s--?(?:no)?(config\.[\w.]+)", " ".join(arguments)):
    if known and not any(field == name or field.startswith(f"{name}.") for field in known):
      return f"{name}: {nearest(name, known, 'configs/base.py explains them all.')}"
  return ""


def _no_flag(error: flags.UnrecognizedFlagError, arguments: Sequence[str], module: str) -> str:
  """What to say of a flag that there is not. Flags of libraries are not for users, and not named."""
  name, own, fields = error.flagname, _own(module), _unchanged(arguments)
  if name.startswith("config.") and not fields:
    last, value = name.rpartition(".")[2], error.flagvalue.partition("=")[2] or "VALUE"
    way = f"settings of a run are flags, --{last} {value}" if last in own else "add --config configs/tiny.py"
    return f"--{name} changes a config, and no --config was given: {way}."
  return f"no flag is named --{name}: " + nearest(
    name, [*own, *fields], "see --help; fields are in configs/base.py, as --config.optimizer.rate=3e-4.")


def _meeting() -> processes.Meeting | None:
  """Where the flags, or else the environment, say that the processes meet. Raises BadInput."""
  given = [flag.value for flag in MEETING]
  if given == [None] * 3:
    given = [os.environ.get(name) for name in NAMES]
    if None in given:  # of a part, JAX may know the rest
      return None
  if None in given:
    missing = " and ".join(f"--{flag.name}" for flag in MEETING if flag.value is None)
    raise BadInput(f"no {missing} was given: --coordinator, --processes and --process belong together.")
  if not all(str(number).isdecimal() for number in given[1:]):
    raise BadInput(f"{NAMES[1]}={given[1]} and {NAMES[2]}={given[2]} must be whole numbers.")
  return processes.Meeting(given[0], int(given[1]), int(given[2]))


def _join(many: bool) -> None:
  """Makes this process one of those that were started together, if it may be one. Raises BadInput."""
  if many and DISTRIBUTED.value == "auto":
    processes.join(_meeting())
    return
  named = [f"--{flag.name}" for flag in MEETING if flag.value is not None]
  if named:
    raise BadInput(f"{' and '.join(named)} was given to what runs alone: leave it out" +
                   (", or --distributed=off." if many else "."))


def _failed(error: Exception) -> None:
  """Tells of an error that is none of the user's: a defect with its traceback, another process's end in one line."""
  if re.search(r"closed by peer|gloo|coordination service", str(error), re.IGNORECASE):
    print(f"error: {processes.name()}another process ended: see what it said.", file=sys.stderr)
  else:
    print(processes.name(), traceback.format_exc(), sep="", file=sys.stderr)


def _too_large(error: jax.errors.JaxRuntimeError, smaller: str) -> BadInput:
  """What to raise where the devices' memory did not suffice; raises any other error again."""
  _, exhausted, text = str(error).partition("RESOURCE_EXHAUSTED: ")
  if not exhausted or not re.search("memory|alloc", text, re.IGNORECASE):  # a message too long for gRPC exhausts, too
    raise error
  said = " ".join(text.split())[:200].rstrip(".")
  return BadInput(f"a device has too little memory ({said}): {smaller}.")


def run(main: Callable[[], None], module: str, doc: str, many: bool = True,
        smaller: str = "ask for fewer or smaller clips at a time, or give more devices") -> None:
  """Parses the command line and runs `main`; exits with 0, or with 2 after one line about wrong input.

  many: whether it may be one of many processes. smaller: what to do where the devices' memory does not suffice.
  """
  def start() -> None:
    _parse(sys.argv, module)
    if CPU_DEVICES.value:
      meshes.simulate(CPU_DEVICES.value)
    _join(many)
    try:
      main()
    except jax.errors.JaxRuntimeError as error:
      raise _too_large(error, smaller) from None

  logging.set_verbosity(logging.ERROR)  # libraries talk to their developers; our users are told by us
  if {"--help", "-h", "-help", "--helpfull"} & set(sys.argv[1:]):
    print(doc, _flag_help(module), sep="\n")
    sys.exit(0)
  try:
    status = errors.run(start, processes.name)
  except Exception as error:
    if not processes.name():
      raise
    _failed(error)
    status = 1
  if status:
    processes.leave(status)
  sys.exit(status)


def _own(module: str) -> dict[str, flags.Flag]:
  """The flags of one entry point and those that all share."""
  return {flag.name: flag for name in (module, __name__) for flag in flags.FLAGS.get_flags_for_module(name)}


def _flag_help(module: str) -> str:
  lines = [f"  --{flag.name}: {flag.help}" + (f" (default: {flag.default})" if flag.default not in (None, "") else "")
           for flag in _own(module).values() if flag.help]
  return "\n".join(["Flags:", *lines])
