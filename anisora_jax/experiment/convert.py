"""Weights from one format into another: checked, moved a piece at a time, read back; there whole or not at all."""

import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from tqdm.auto import tqdm

from anisora_jax.checkpoints import tensor_file, weights
from anisora_jax.checkpoints.tensor_file import PIECE, Spec, Stored, Tensor, nbytes
from anisora_jax.errors import BadInput, pick
from anisora_jax.experiment import adapters, origin
from anisora_jax.experiment.runs import saved_config
from anisora_jax.experiment.weights import EXPERTS, FOLDERS, TRANSFORMER, Source, find, spoilt, write_ours
from anisora_jax.experiment.weights import source as base_of
from anisora_jax.models.wan import published
from anisora_jax.models.wan.published import KINDS
from anisora_jax.models.wan.sizes import SIZES

DTYPES = {name: np.dtype(dtype) for name, dtype in
          {"float32": np.float32, "bfloat16": jnp.bfloat16, "float16": np.float16}.items()}
FORMATS = ("ours", "wan", "diffusers", "comfyui", *adapters.FORMATS)
SHARDS = "diffusion_pytorch_model"  # how the files of Wan's transformers begin
WORKERS = 2  # one reads and sums while the other writes: more would wait for each other at the file they write


class Choice(NamedTuple):
  """ema: of a run the averaged parameters. loras: files of adapters to be merged, each "FILE" or "EXPERT=FILE"; scale:
  how often they count."""

  ema: bool = False
  loras: Sequence[str] = ()
  scale: float = 1.0


PLAIN = Choice()


class Room(threading.local):
  """Memory for one piece, of each thread its own."""

  def __init__(self):
    self.bytes = memoryview(bytearray(PIECE))


ROOM = Room()


def convert(path: Path, to: Path, form: str, dtype: str = "", shard: float = 5e9, choice: Choice = PLAIN,
            say: Callable[[str], None] = print) -> None:
  """Writes the weights at `path` into the new folder `to`. Raises BadInput, and then leaves nothing behind.

  form: of FORMATS. dtype: of DTYPES, or "" to keep each tensor's own. shard: bytes of a file at most, unless one
  tensor is more; comfyui takes one file. choice: what of the weights is taken, and what is added to them.
  """
  began, to = time.perf_counter(), Path(to).absolute()
  if form not in FORMATS:
    raise BadInput(f"no format is named {form!r}: take one of {', '.join(FORMATS)}.")
  cast = pick(DTYPES, dtype, "dtype") if dtype else None
  if os.path.lexists(to) and not (to.is_dir() and not any(to.iterdir())):
    raise BadInput(f"{to} exists and is no empty folder: give another --to.")
  if form in adapters.FORMATS:
    if dtype:
      raise BadInput(f"--dtype {dtype} is not for adapters, which stay float32: leave it out.")
    if choice.loras:
      raise BadInput(f"--lora {choice.loras[0]} is merged into weights and not into adapters: take the format wan, "
                     "diffusers, comfyui or ours.")
    write = adapters.export(path, to, form, choice.ema, say)
    with _staged(to, 0) as folder:
      write(folder)
    say(f"{to}: written and read back.")
    return
  found = _tuned(path, choice.ema, cast) or find(path, choice.ema, cast, tuple(KINDS.values()))
  for lora in choice.loras:
    found |= _merged(path, found, lora, choice.scale, cast, say)
  for expert, source in found.items():
    say(f"{source.where}{' ' * bool(expert)}{expert}: {source.kind.noun}, "
        f"{published.title(source.kind, source.size)}, {source.naming} names, {_dtypes(source, cast)}"
        + f"; {source.unused} tensors that Wan does not use are left out" * bool(source.unused))
    source.kind.refuse(source.size, form)
  total = sum(_size(tensor, cast) for source in found.values() for tensor in source.tensors.values())
  with _staged(to, total) as folder, tqdm(total=2 * total, desc=form, unit="B", unit_scale=True) as bar:
    for number, (expert, source) in enumerate(found.items()):
      _write(source, form, _place(folder, to.name, form, number if expert else None), cast, shard, bar.update)
  seconds = time.perf_counter() - began
  say(f"{to}: {total / 1e9:.2f} GB in {seconds:.1f} s, {total / 1e6 / seconds:.0f} MB/s; every tensor was read back "
      f"and {'compared' if form == 'ours' else 'its CRC-32 compared'}.")


def _tuned(run: Path, ema: bool, dtype: np.dtype | None) -> dict[str, Source]:
  """Of a run that trained adapters, the network beside which it did, with the adapters added; {} for all else."""
  if not (run / "checkpoints").is_dir() or not saved_config(run).lora.rank:
    return {}
  config = saved_config(run)
  size, expert = pick(SIZES, config.model.size, "model size"), config.model.expert
  try:
    made = base_of(Path(origin.base_of(run, config)), size, expert, dtype=dtype)
    for adapter in origin.adapters_of(config.model.adapters, expert):  # what its base was given before it was tuned
      made = made.with_adapters(flatten_dict(adapter.read(size), sep="/"), adapter.scale, dtype)
  except BadInput as mistake:
    raise BadInput(f"{run} holds adapters, and of the weights beside which they were trained: {mistake}") from None
  _, lora, found = adapters.of_run(run, config, ema)
  return {"": replace(made.with_adapters(found, lora.scale, dtype), where=run)}


def _merged(path: Path, found: dict[str, Source], lora: str, scale: float, dtype: np.dtype | None,
            say: Callable[[str], None]) -> dict[str, Source]:
  """The one transformer for which a file of adapters is, with them. lora: "FILE" or "EXPERT=FILE"."""
  head, equals, tail = lora.partition("=")
  expert, file = (head, tail) if equals and head in EXPERTS else ("", lora)
  if expert not in found:
    raise BadInput(f"{path} holds two experts: say for which --lora {file} is, "
                   f"{' or '.join(f'{name}={file}' for name in EXPERTS)}." if not expert else
                   f"{path} holds one transformer and no {expert}: give --lora {file}.")
  source = found[expert]
  if source.kind is not TRANSFORMER:
    raise BadInput(f"--lora {file} is for a transformer and {path} holds weights of another kind, "
                   f"{source.kind.noun}: leave it out.")
  form, there = adapters.of_file(Path(file), source.size)
  say(f"{file}: adapters by the names of {form}, added {scale:g} times")
  return {expert: source.with_adapters(there, scale, dtype)}


def _place(folder: Path, name: str, form: str, expert: int | None) -> Path:
  """The folder, for comfyui the file, of one transformer. expert: 0 or 1 where there are two."""
  if form == "comfyui":
    return folder / (name if expert is None else f"{name}_{EXPERTS[expert]}")
  pair = {"wan": FOLDERS[0], "diffusers": FOLDERS[1], "ours": FOLDERS[2]}[form]
  return folder if expert is None else folder / pair[expert]


def _size(tensor: Tensor, cast: np.dtype | None) -> int:
  return math.prod(tensor.shape) * (cast or tensor.dtype).itemsize


def _dtypes(source: Source, cast: np.dtype | None) -> str:
  """What dtypes the tensors have and get, in words. Raises BadInput for a mixture that is not one of publishers."""
  paths = {entry.name: entry.path for entry in source.entries()}
  kinds = {name: tensor.dtype for name, tensor in source.tensors.items()}
  strange = next((name for name, dtype in kinds.items() if dtype not in DTYPES.values() and not cast), None)
  if strange:
    raise BadInput(f"{source.where}: {strange} is {kinds[strange]}, and {', '.join(DTYPES)} can be kept: choose one "
                   "with --dtype.")
  main = max(set(kinds.values()), key=lambda dtype: sum(nbytes(source.tensors[name]) for name in kinds
                                                        if kinds[name] == dtype))
  # One dtype, or matrices of 16 bits and float32 where the network computes in float32, in all layers alike.
  narrow = {paths.get(name, name) for name, dtype in kinds.items() if dtype == main}
  wide = {path for path in paths.values() if main.itemsize == 2 and re.search(source.kind.wide, path)} - narrow
  odd = [name for name, dtype in kinds.items()
         if dtype != main and not (dtype == np.float32 and paths.get(name, name) in wide)]
  if odd and not cast:
    raise BadInput(f"{source.where} mixes dtypes: most is {main} and {odd[0]} is {kinds[odd[0]]} ({len(odd)} such "
                   "tensors): choose one with --dtype.")
  others = sum(dtype != main for dtype in kinds.values())
  text = f"{main}" + f" with {others} tensors in other dtypes" * bool(others)
  return text if cast is None else f"{text}, all made {cast}"


@contextmanager
def _staged(to: Path, total: int) -> Iterator[Path]:
  """A folder beside `to` that takes its name when all is done, and is deleted when anything goes wrong."""
  folder = to.with_name(f".{to.name}.{os.getpid()}")
  try:
    to.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(to.parent).free
    if free < total:
      raise BadInput(f"{to.parent} has {free:,} bytes free and {total:,} are needed: free some space.")
    folder.mkdir()
    yield folder
    for path in folder.rglob("*"):
      _to_disk(path)  # or a power cut could leave a good name on empty files
    folder.rename(to)
    _to_disk(to.parent)
  except OSError as error:
    raise BadInput(f"{to} was not written: {error.strerror or error}; nothing of it was kept.") from None
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _to_disk(path: Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  os.fsync(handle)
  os.close(handle)


def _write(source: Source, form: str, place: Path, cast: np.dtype | None, shard: float,
           told: Callable[[int], object]) -> None:
  """Writes one transformer and reads it back."""
  if form == "ours":
    place.mkdir(parents=True, exist_ok=True)
    write_ours(source, place, cast)
    told(2 * sum(_size(tensor, cast) for tensor in source.tensors.values()))
    return
  folder = place.parent if form == "comfyui" else place
  folder.mkdir(parents=True, exist_ok=True)
  naming, stem, config = source.kind.forms[form]
  tensors = source.torch(naming)
  specs = {name: (cast or tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
  if form == "comfyui":
    where = tensor_file.create(place.with_name(f"{place.name}.safetensors"), specs)
  else:
    where = shards(folder, specs, shard, stem)
    if config:
      (folder / "config.json").write_text(json.dumps(config(source.size), indent=2) + "\n")
  sums = _each(_move, [(tensor, where[name]) for name, tensor in tensors.items()], told)
  there = weights.find(where[next(iter(where))].path if form == "comfyui" else folder)
  again = _each(_sum, [(there[name],) for name in tensors], told)
  for name, written, found in zip(tensors, sums, again, strict=True):
    if (there[name].dtype, there[name].shape) != specs[name] or written != found:
      raise spoilt(name)


def shards(folder: Path, specs: Mapping[str, Spec], most: float, stem: str = SHARDS) -> dict[str, Stored]:
  """Makes the files, and the index if there are several, as save_pretrained of diffusers and transformers does."""
  groups, room = [{}], most
  for name, (dtype, shape) in specs.items():
    size = math.prod(shape) * dtype.itemsize
    if size > room and groups[-1]:
      groups.append({})
      room = most
    groups[-1][name], room = (dtype, shape), room - size
  files = [f"{stem}-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
  files = files if len(groups) > 1 else [f"{stem}.safetensors"]
  if len(groups) > 1:
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())
    index = {"metadata": {"total_size": total},
             "weight_map": {name: file for file, group in zip(files, groups, strict=True) for name in group}}
    (folder / f"{stem}.safetensors{weights.INDEX}").write_text(json.dumps(index, indent=2) + "\n")
  made = [tensor_file.create(folder / file, group) for file, group in zip(files, groups, strict=True)]
  return {name: stored for group in made for name, stored in group.items()}


def _each(work: Callable, jobs: Sequence[tuple], told: Callable[[int], object]) -> list[int]:
  """Does the jobs side by side; tells the bytes of each. An error or Ctrl-C leaves the rest undone."""
  done, pool = [], ThreadPoolExecutor(WORKERS)
  try:
    futures = [pool.submit(work, *job) for job in jobs]
    for future, job in zip(futures, jobs, strict=True):
      done.append(future.result())
      told(nbytes(job[-1]))
  finally:
    pool.shutdown(cancel_futures=True)
  return done


def _move(tensor: Tensor, place: Stored) -> int:
  pieces = tensor.pieces(ROOM.bytes)
  if tensor.dtype != place.dtype:
    pieces = map(partial(_cast, tensor.dtype, place), pieces)
  return tensor_file.fill(place, pieces)


def _cast(dtype: np.dtype, place: Stored, piece: memoryview) -> memoryview:
  return memoryview(tensor_file.cast(np.frombuffer(piece, dtype), place.dtype).view(np.uint8))


def _sum(tensor: Stored) -> int:
  return tensor_file.crc32(tensor.pieces(ROOM.bytes))
