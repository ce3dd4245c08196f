"""Save and restore sharded state with the loader's position and the config, in the background, onto any mesh.

    checkpoints/
      8/            a finished checkpoint: Orbax's files and the manifest.json of all of them
      unfinished/   what is being written or deleted; belongs to nobody once its writer is dead

Orbax writes into unfinished/<step>, the manifest is added there, and one rename makes the checkpoint appear whole: a
kill at any moment leaves either a checkpoint whose every byte can be checked, or rubbish that is never looked at.
A folder without a manifest, a link and any other name are somebody else's: never read, never deleted.
"""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint import multihost
from orbax.checkpoint import v1 as ocp

from anisora_jax.checkpoints import manifest
from anisora_jax.errors import BadInput
from anisora_jax.parallel import offload

# Smaller arrays are written whole by one of the devices that hold them: each cut of another shape would be a program to
# compile, seconds of them in the first save of a small run.
CUT = ocp.options.ArrayOptions(saving=ocp.options.ArrayOptions.Saving(min_slice_bytes_for_replica_parallel=2**20))
ROOM = 2**20  # bytes for what Orbax and the manifest add to the arrays
DAY = 24 * 3600  # seconds in which the first host must have read back what all have written


def agreed(number: int) -> int:
  """The first host's number, on every host: hosts that decided apart would wait for each other for ever."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def size(state: PyTree) -> int:
  """Bytes of all leaves, over all hosts; what a checkpoint takes at most (Orbax compresses)."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def to_give_away(leaf: Any) -> Any:
  """A leaf as Orbax may hold it while the state's own is donated: of one in the host's memory a copy."""
  # Orbax writes such an array from its own memory, and XLA's GPU client gives none away of which there is a view.
  there = isinstance(leaf, jax.Array) and leaf.sharding.memory_kind == offload.HOST
  return jax.device_put(leaf, leaf.sharding, may_alias=False) if there else leaf


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
  """Leaves by "params/block/kernel"; the same for a dataclass, a named tuple and the dict Orbax makes of either."""
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
          for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def spread(wanted: PyTree, stored: PyTree) -> PyTree:
  """Puts the stored subtree, each leaf `...`, wherever `wanted` has one `...` for all of it."""
  def subtree(path: tuple, leaf: Any) -> PyTree:
    if leaf is not ...:
      return leaf
    node = stored
    for entry in path:
      key = getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", None)))
      try:
        node = node[key]
      except (KeyError, IndexError, TypeError):
        return leaf  # not there: the comparison with the model will say so
    return jax.tree.map(lambda _: ..., node)
  return jax.tree_util.tree_map_with_path(subtree, wanted)


def refuse_other_model(stored: PyTree, wanted: PyTree, where: Path) -> None:
  """Raises BadInput naming the first array that the checkpoint and the model do not share in shape and dtype.

  Orbax casts a dtype silently. A leaf `...` of `wanted` is not read and may have any.
  """
  have, want = leaves_by_path(stored), leaves_by_path(wanted)
  wrong = []
  for path in [*want, *(path for path in have if path not in want)]:
    a, b = ("absent" if path not in tree else "not read" if tree[path] is ... else
            f"{tree[path].dtype}{list(tree[path].shape)}" for tree in (have, want))
    if a != b and not (b == "not read" and path in have):
      wrong.append(f"{path} is {a} in the checkpoint and {b} in the model")
  if wrong:
    others = f" (and {len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
    raise BadInput(f"{where} is of another model: {wrong[0]}{others}: use the config it was trained with.")


class Checkpoints:
  """The checkpoints of one run, in one folder. Every host makes the same calls in the same order.

  keep: how many finished checkpoints remain; the older ones are deleted after a new one is finished, never before.
  say: takes one line of text for the user.
  """

  def __init__(self, folder: str | Path, keep: int = 3, say: Callable[[str], None] = print):
    if keep < 1:
      raise BadInput(f"checkpoints to keep: got {keep}, need at least 1.")
    # Orbax wants absolute paths.
    self.folder, self.keep, self.say = Path(folder).absolute(), keep, say
    self._thread: threading.Thread | None = None
    self._failure: str | None = None  # of the last save
    self._told: str | None = None
    self._spoilt: set[int] = set()
    self._stuck: set[Path] = set()  # what could not be deleted

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: object) -> None:
    """Lets the save that is being written end, also when the trainer dies of something else; says if it failed."""
    self._join()
    self._tell()

  @property
  def _unfinished(self) -> Path:
    return self.folder / "unfinished"

  def steps(self) -> list[int]:
    """Steps of the finished checkpoints, oldest first; their bytes are not checked here."""
    return [step for step in self._numbered() if (self.folder / str(step) / manifest.NAME).is_file()]

  def last(self) -> int:
    """The step of the newest finished checkpoint, on every host; 0 where no save has ended. Bytes are not checked.

    Raises BadInput where there are only folders without a manifest: a run would start from 0 among what is left of it.
    """
    last = agreed(max(self.steps(), default=-1 if self._numbered() else 0))
    if last < 0:
      raise BadInput(f"{self.folder} holds numbered folders and no finished checkpoint (none has a {manifest.NAME}): "
                     "restore one from a copy, or move them away to start from step 0.")
    return last

  def _numbered(self) -> list[int]:
    if not self.folder.is_dir():
      return []
    # str(int(name)) == name: "008" and "²" are not ours.
    return sorted(int(path.name) for path in self.folder.iterdir()
                  if path.name.isdecimal() and str(int(path.name)) == path.name and path.is_dir()
                  and not path.is_symlink())

  def save(self, step: int, state: PyTree, loader: dict, config: dict) -> float:
    """Begins to save and returns the seconds that the caller was held up. loader, config: JSON.

    The state may be donated or changed as soon as this returns: until the save has ended, its arrays in the host's
    memory (see `parallel.offload`) are held twice, and copies on the host of all others. Waits first for a save that
    is still being written.
    A save that failed, now or before, is said in one line and leaves the earlier checkpoints as they are.
    """
    began = time.perf_counter()
    self._join()
    self._tell()
    self._failure = None
    if not agreed(self._prepare(step, size(state) + ROOM)):
      self._failure = self._failure or f"the checkpoint of step {step} was not written, as the first host says."
      self._tell()
      return time.perf_counter() - began
    with ocp.Context(array_options=CUT):
      response = ocp.save_checkpointables_async(self._unfinished / str(step),
                                                {"state": jax.tree.map(to_give_away, state)},
                                                custom_metadata={"loader": loader, "config": config})
    self._thread = threading.Thread(target=self._finish, args=(step, response.result), name=f"checkpoint {step}")
    self._thread.start()
    return time.perf_counter() - began

  def wait(self) -> None:
    """Waits until the last save is finished; raises BadInput if it failed, for then its steps would be lost."""
    self._join()
    if not agreed(self._failure is None):
      self._failure = self._failure or "the last checkpoint was not finished, as the first host says."
    if self._failure:
      self._told, self._failure = self._failure, None
      raise BadInput(self._told)

  def restore(self, abstract: PyTree) -> tuple[int, PyTree, dict]:
    """The newest checkpoint whose bytes are all as written: its step, its state, the loader's position.

    abstract: the state's tree of jax.ShapeDtypeStruct with shardings, of whatever mesh; a `...` in place of
    a leaf or of a whole subtree is not read (each leaf under it comes back as `...`).
    Says in one line which newer checkpoints were passed over, and why. Raises BadInput if none is good or if the
    checkpoint is of another model.
    """
    path = self.newest()
    about = ocp.checkpointables_metadata(path)
    abstract = spread(abstract, about.metadata["state"])
    refuse_other_model(about.metadata["state"], abstract, path)
    state = ocp.load_checkpointables(path, {"state": abstract})["state"]
    return int(path.name), state, about.custom_metadata["loader"]

  def newest(self) -> Path:
    """The folder of the newest checkpoint whose bytes are all as written, on every host; else raises BadInput."""
    step = agreed(self._newest_good() if jax.process_index() == 0 else 0)
    if step < 0:
      raise BadInput(f"{self.folder} holds no good checkpoint: restore it from a copy, or start in another folder.")
    return self.folder / str(step)

  def whole(self, step: int) -> Path:
    """The folder of one checkpoint, on every host. Raises BadInput where its bytes are not all as written."""
    path = self.folder / str(step)
    wrong = manifest.fault(path, step) if jax.process_index() == 0 else None
    if not agreed(wrong is None):
      raise BadInput(f"{path} is damaged: {wrong or 'as the first host says'}; restore it from a copy.")
    return path

  def config(self, step: int) -> dict:
    """The config that a checkpoint was saved with."""
    return ocp.checkpointables_metadata(self.folder / str(step)).custom_metadata["config"]

  def _newest_good(self) -> int:
    """The newest step whose bytes are as written, or -1."""
    for step in reversed(self._numbered()):
      path = self.folder / str(step)
      if not (path / manifest.NAME).exists():
        self.say(f"{path} has no {manifest.NAME}: not a finished checkpoint, ignored.")
        continue
      wrong = manifest.fault(path, step)
      if wrong is None:
        return step
      self._spoilt.add(step)
      self.say(f"{path} is damaged: {wrong}; looking for the checkpoint before it.")
    return -1

  def _prepare(self, step: int, need: int) -> bool:
    """Clears what dead or failed saves left, and sees whether there is room. Only the first host touches files."""
    if jax.process_index() != 0:
      return True
    try:
      self._unfinished.mkdir(parents=True, exist_ok=True)
      for path in self._unfinished.iterdir():
        self._delete(path)
      if (self._unfinished / str(step)).exists():
        raise FileExistsError(f"{self._unfinished / str(step)} is in the way: delete it")
      free = shutil.disk_usage(self.folder).free
    except OSError as error:
      self._failure = f"the checkpoint of step {step} was not written: {error}."
      return False
    if free < need:
      self._failure = (f"the checkpoint of step {step} was not written: {self.folder} has {free:,} bytes free and it "
                       f"needs up to {need:,}: free some space; earlier checkpoints are untouched.")
    return free >= need

  def _finish(self, step: int, written: Callable[[], None]) -> None:
    """In the background: waits for Orbax, adds the manifest, makes the checkpoint appear, deletes old ones."""
    try:
      try:
        written()  # every host's files are there: Orbax commits behind a barrier
        if jax.process_index() == 0:
          manifest.write(self._unfinished / str(step), step)
          self._appear(step)
          self._delete_old(step)
      finally:
        # Whoever is done early waits here and not in a collective or at its exit, where JAX ends all after minutes.
        # The dead are not waited for: JAX misses them and ends the others.
        multihost.get_barrier_sync_fn()(key=f"checkpoint {step}", timeout_ms=1000 * DAY)
    except Exception as error:  # whatever it is, it belongs to the thread that trains, which asks for it
      reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
      self._failure = (f"the checkpoint of step {step} was not finished: {reason}; "
                       f"earlier checkpoints in {self.folder} are untouched.")

  def _appear(self, step: int) -> None:
    final, replaced = self.folder / str(step), None
    if step in self.steps():
      # Damaged and redone, or a step trained again from an older one.
      replaced = self._set_aside(step)
    if final.is_symlink() or final.exists():
      raise FileExistsError(f"{final} is in the way and is not ours: move it away")
    (self._unfinished / str(step)).rename(final)
    self._spoilt.discard(step)
    if replaced:
      self._delete(replaced)

  def _delete_old(self, step: int) -> None:
    """Of the checkpoints up to this step leaves the newest `keep` good ones. Newer ones are none of this run's."""
    ours = [other for other in self.steps() if other <= step]
    good = [other for other in ours if other not in self._spoilt][-self.keep:]
    for other in sorted(set(ours) - set(good)):
      try:
        # The rename comes first: a kill during the deletion must not leave half a checkpoint under a good name.
        self._delete(self._set_aside(other))
      except OSError as error:
        self._tell_stuck(self.folder / str(other), error)

  def _set_aside(self, step: int) -> Path:
    """Moves a checkpoint among what is deleted, under a name of its own: an earlier one may not have gone."""
    return (self.folder / str(step)).rename(self._unfinished / f"old.{step}.{time.time_ns()}")

  def _delete(self, path: Path) -> None:
    """Deletes what nobody needs, as far as that can be done; the next save tries again."""
    try:
      if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
      else:
        path.unlink(missing_ok=True)
    except OSError as error:
      self._tell_stuck(path, error)

  def _tell_stuck(self, path: Path, error: OSError) -> None:
    """Says once that something stays that nobody needs. No save depends on it."""
    if path not in self._stuck:
      self._stuck.add(path)
      self.say(f"{path} cannot be deleted ({error.strerror or error}) and takes room: delete it.")

  def _tell(self) -> None:
    """Says once that the last save failed."""
    if self._failure and self._failure != self._told:
      self.say(self._failure)
      self._told = self._failure

  def _join(self) -> None:
    if self._thread:
      self._thread.join()
      self._thread = None
