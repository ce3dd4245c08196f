"""Parts become a training run, or an account of what it would take."""

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from anisora_jax.checkpoints import manifest, workdir
from anisora_jax.checkpoints.orbax import Checkpoints
from anisora_jax.errors import BadInput
from anisora_jax.experiment import advised, encode, encoders, origin
from anisora_jax.experiment.encoders import Captions
from anisora_jax.experiment.parts import (
  Parts,
  abstract_params,
  abstract_trained,
  assemble,
  begin,
  budget,
  init,
  loader,
  to_devices,
)
from anisora_jax.loaders import mixture, records
from anisora_jax.loaders.buckets import Bucket
from anisora_jax.models.attention import PATTERNS
from anisora_jax.parallel import halo, offload, placement, processes, sight, targets, traffic
from anisora_jax.parallel import mesh as meshes
from anisora_jax.parallel.traffic import Sent
from anisora_jax.planning import memory
from anisora_jax.training import loop, optimizer, report, state, step
from anisora_jax.training.stop import Stop

RANDOM = "starts from random weights; --config.pretrained=FOLDER or --config.model.weights=PATH give others."
# What a run may be resumed with otherwise, which is then said: where and how fast it runs and what it tells. Some may
# change what it learns from then on: train.steps moves the end of cosine and wsd, optimizer.rate and clip help where it
# is no longer finite, data.records changes the clips, and other weights the base of adapters and the encoders. Folders
# may have moved, so that they hold the same is not checked, but for a base that is a run, and how many clips there are.
# Before its first checkpoint, as when a step did not fit the memory, it may take anything.
MAY_CHANGE = ("mesh.*", "pretrained", "*.weights", "text.tokenizer", "model.attention", "model.kernel", "model.remat",
              "optimizer.rate", "optimizer.clip", "optimizer.offload", "data.threads", "data.records", "sample.*",
              "train.steps", "train.micro_batches", "train.report", "train.held_out*", "train.checkpoint", "train.keep")


def abstract_batch(parts: Parts, bucket: Bucket) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and placement of what the step takes."""
  b, (F, height, width), size = bucket.batch, (bucket.frames, bucket.height, bucket.width), parts.size
  latents, kind = (b, *parts.latent_shape(bucket), size.channels), np.float16 if parts.encoded else np.float32
  clips = (b, parts.packed) if parts.packed else (b,)
  text = {"text": ((*clips, size.text_tokens, size.text_width), kind), "ok": (clips, np.float32)}
  if parts.encoded:
    masks = latents[1] * parts.codec.temporal if parts.packed else F
    shapes = {"latents": (latents, kind), "known": (latents, kind), "mask": ((b, masks, *latents[2:4]), np.bool_),
              **text, **({"segment": (latents[:2], np.int32)} if parts.packed else {})}
    if size.image_width:
      shapes["image"] = ((*clips, parts.image_tokens, size.image_width), kind)
  else:
    shapes = {"frames": ((b, F, height, width, 3), np.uint8), "character": ((b, F, height, width), np.bool_), **text}
  split = jax.sharding.NamedSharding(parts.mesh, jax.P(meshes.ROWS))
  everywhere = jax.sharding.NamedSharding(parts.mesh, jax.P(parts.mesh.axis_names))
  return {**{name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, (shape, dtype) in shapes.items()},
          "stop": jax.ShapeDtypeStruct((parts.mesh.size,), np.int32, sharding=everywhere)}


def _state(parts: Parts, chain, base: PyTree | None) -> state.TrainState:
  """base: parameters to start from, or to adapt."""
  if parts.lora:
    return state.create(begin(parts, base), chain)
  return state.create(init(parts) if base is None else base, chain)


def training_state(parts: Parts, chain) -> tuple[PyTree, Callable[[PyTree | None], state.TrainState]]:
  """(shapes and placement of the state, function that makes it of parameters that were read, or of None).

  No device ever holds a whole parameter of it.
  """
  params = abstract_trained(parts)
  make = partial(_state, parts, chain)
  shapes = jax.eval_shape(make, abstract_params(parts) if parts.lora else None)
  placed = placement.like(shapes, params, jax.tree.map(lambda leaf: leaf.sharding, params), parts.mesh)
  if parts.offload:
    placed = placed.replace(**{part: offload.on_host(getattr(shapes, part), getattr(placed, part))
                               for part in ("opt", "ema")})
  abstract = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, placed)
  return abstract, lambda base: jax.jit(make, out_shardings=placed)(base)


def compiled_step(parts: Parts, chain, abstract: PyTree):
  """The jitted training step of the buckets that group the devices as `parts` does; takes over the state's memory."""
  average = partial(optimizer.ema, limit=parts.optimizer.ema)
  placed = jax.tree.map(lambda x: x.sharding, placement.viewed(abstract, parts.mesh))
  method = replace(parts.method, shares=partial(placement.hold_each, placed=placed.params))
  work = step.make_step(method, chain, average, partial(offload.fetched, placed=placed))
  return jax.jit(work, donate_argnums=0, out_shardings=(placed, None),
                 compiler_options=parts.compiler_options)


def stepping(parts: Parts, chain, abstract: PyTree, frozen: step.Frozen) -> tuple[Callable[[dict], Parts], Callable]:
  """(batch -> the parts of its bucket, the training step of all buckets)."""
  ways = {bucket: parts.of(bucket) for bucket in parts.buckets}
  runs = {there.mesh: (compiled_step(there, chain, abstract), placement.viewed(frozen, there.mesh))
          for there in ways.values()}

  def way(batch: dict) -> Parts:
    return ways[_bucket_of(parts, batch)]

  def advance(now: state.TrainState, batch: dict) -> tuple[state.TrainState, step.Measures]:
    there = way(batch).mesh
    run, beside = runs[there]
    return run(placement.viewed(now, there), batch, beside)

  return way, advance


def held_out_clips(parts: Parts, config: ConfigDict) -> mixture.Batches | None:
  """The loader of held-out clips, None where no loss of them is due. Raises BadInput, which says how to do without."""
  try:
    return loader(parts, config, "held_out") if config.train.held_out else None
  except BadInput as mistake:
    raise BadInput(f"{str(mistake).rstrip('.')}; or train without a held-out loss: "
                   "--config.train.held_out=0.") from None


def held_out_loss(parts: Parts, clips: mixture.Batches, count: int, frozen: step.Frozen, captions: Captions | None,
                  left_out: report.LeftOut) -> Callable[[state.TrainState], dict[str, float]]:
  """state -> held-out loss of the averaged parameters in each bin of noise time, always on the same batches.

  They are up to `count` of the first bucket for which there are any clips, which are closed.
  """
  wanted = list(itertools.islice(clips, count))
  bucket = _bucket_of(parts, wanted[0])  # the first that has any
  parts = replace(parts, replicas=1).of(bucket)
  measure = jax.jit(step.make_held_out(parts.method), compiler_options=parts.compiler_options)
  frozen = placement.viewed(frozen, parts.mesh)
  batches = [to_devices(parts, captions, batch) for batch in wanted if _bucket_of(parts, batch) == bucket]
  clips.close()
  left_out(clips.bad)

  def measures(now: state.TrainState) -> dict[str, float]:
    average = placement.viewed(offload.on_device(now.ema), parts.mesh)
    bins = np.mean([measure(average, batch, number, frozen) for number, batch in enumerate(batches)], axis=0)
    names = [f"held_out/t {(k + 0.5) / step.BINS:.1f}" for k in range(step.BINS)]
    return {"held_out": float(bins.mean()), **{name: float(value) for name, value in zip(names, bins, strict=True)}}

  return measures


def parameters(parts: Parts) -> str:
  """How many there are, for people."""
  adapters = sum(leaf.size for leaf in jax.tree.leaves(abstract_trained(parts))) if parts.lora else 0
  return f"{parts.size.parameters():,} parameters" + (f", {adapters:,} of adapters are trained" if adapters else "")


def frozen_parts(parts: Parts, config: ConfigDict) -> tuple[step.Frozen, Captions | None]:
  """(what a run reads and does not train, without a base; the text encoder, or None if records hold text tokens)."""
  if parts.encoded:
    return step.Frozen(parts.codec, blank=meshes.everywhere(parts.mesh, encode.empty_text(parts, config))), None
  if parts.image_tokens:
    raise BadInput(f"model size {config.model.size!r} reads image tokens, which training does not make: turn clips "
                   "into latents with encode, and train on them with --config.data.encoded=True.")
  captions = encoders.captions(config, parts.mesh, parts.size)
  codec = encoders.load_codec(config, parts.mesh, ["encoder"])
  return step.Frozen(codec, blank=meshes.everywhere(parts.mesh, captions([""])[0])), captions


def abstract_frozen(parts: Parts, config: ConfigDict) -> step.Frozen:
  """Shapes and placement of what a run reads and does not train."""
  blank = jax.ShapeDtypeStruct((parts.size.text_tokens, parts.size.text_width), np.float32)
  codec = parts.codec if parts.encoded else encoders.abstract_codec(config, parts.mesh, ["encoder"])
  return step.Frozen(codec, abstract_params(parts, kept=True) if parts.lora else None, blank)


def see_what_the_first_sees(folder: Path, newest: int) -> None:
  """Raises BadInput in a process that does not find the config and the newest checkpoint (0 for none) of process 0."""
  wanted = [folder / "config.json", *([folder / "checkpoints" / str(newest) / manifest.NAME] if newest else [])]
  if not processes.appeared(wanted, processes.SEEN):
    raise BadInput(f"{wanted[-1]}, which process 0 has, is not seen here: take a folder that all machines share.")


def telling(say: Callable[[str], None]) -> Callable[[str], None]:
  """What says a line that each process has for itself. say: what the first one says it by."""
  tell = say if meshes.leads() else partial(print, file=sys.stderr)
  return lambda line: tell(processes.name() + line)


def train(config: ConfigDict, folder: Path, say: Callable[[str], None] = print) -> bool:
  """Trains, or goes on with the run that `folder` holds, until its last step or a signal; then all is saved.

  Returns whether it was a signal. Every process of a run makes the same call.
  """
  say = say if meshes.leads() else lambda line: None
  with Stop() as stop, workdir.lock(folder, say):
    parts = assemble(config)
    batches, held_out = loader(parts, config, "train"), held_out_clips(parts, config)
    chain, rate = optimizer.build(parts.optimizer, abstract_trained(parts))
    abstract, make = training_state(parts, chain)
    due = loop.Due(config.train.steps, config.train.report, config.train.held_out, config.train.checkpoint,
                   config.train.held_out_batches)
    plain = json.loads(config.to_json_best_effort())
    newest = Checkpoints(folder / "checkpoints").last()
    fresh, begun = newest == 0, folder if newest else None
    source = origin.source_of(parts, config, config.model.expert, begun) if parts.lora or fresh else None
    frozen, captions = frozen_parts(parts, config)
    for field, change in workdir.keep_config(folder, plain, ("*",) if fresh else MAY_CHANGE).items():
      say(f"{'begins' if fresh else 'resumes'} with another {field}: {change}")
    origin.remember(folder, config, source)
    see_what_the_first_sees(folder, newest)
    with Checkpoints(folder / "checkpoints", keep=config.train.keep, say=say) as checkpoints:
      began, start = 0, source and origin.read(parts, config, source, bool(parts.lora), config.model.expert)
      if not fresh:
        began, now, position = checkpoints.restore(abstract)
        others = batches.seek(position)
        say(f"resumes after step {began} of {config.train.steps}{others}.")
      else:
        now = make(start)
      frozen = frozen.replace(base=start if parts.lora else None)
      del start  # what was trained from it is a copy
      short = f", {batches.short} more are too short for every bucket" if batches.short else ""
      way, advance = stepping(parts, chain, abstract, frozen)
      say("\n".join([f"{meshes.describe(parts.mesh)}; {parameters(parts)}; {batches.length} clips{short}.",
                     *budget(parts, config), *([] if source or not fresh else [RANDOM])]))
      # All at once and now: while a run goes on, a device would answer only after the steps under way. A step that is
      # left out counts here as an update, and for the optimiser as none.
      rates = np.asarray(jax.vmap(rate)(jnp.arange(due.steps)))
      peak = report.peak(meshes.device_kind(parts.mesh))
      clock = report.Clock(peak=peak and peak * parts.mesh.size)
      with report.Report(folder, began, config.train.steps, meshes.leads()) as out:
        left_out = {split: report.LeftOut(telling(out.say), split) for split in records.SPLITS}

        def place(batch: dict) -> dict[str, jax.Array]:
          left_out["train"](batches.bad)
          return to_devices(way(batch), captions, batch)

        effects = loop.Effects(
          place=place, rate=lambda number: float(rates[number - 1]), work=partial(_work, parts),
          ids=lambda batch: meshes.gather(way(batch).mesh, batch["id"]),
          held_out=(held_out_loss(parts, held_out, due.held_out_batches, frozen, captions, left_out["held_out"])
                    if held_out else lambda _: {}),
          save=lambda number, now, position: checkpoints.save(number, now, position, plain),
          wait=checkpoints.wait, report=out, say=out.say)
        now, number, stopped = loop.run(now, advance, batches, due, effects, stop, clock)
    batches.close()
    say(f"stopped after step {number}, saved; the same command goes on." if stopped else
        f"trained {number} steps; everything is in {folder}.")
    return stopped


def _bucket_of(parts: Parts, batch: dict) -> Bucket:
  if parts.encoded:
    shape = batch["latents"].shape[1:4]
    return next(bucket for bucket in parts.buckets if parts.latent_shape(bucket) == shape)
  shape = batch["frames"].shape[1:4]
  return next(bucket for bucket in parts.buckets if (bucket.frames, bucket.height, bucket.width) == shape)


def _work(parts: Parts, batch: dict) -> tuple[int, float]:
  """(tokens, model FLOPs) of a batch of all hosts, of the clips that are in it."""
  bucket = _bucket_of(parts, batch)
  if "segment" not in batch:
    return parts.work(bucket)
  # Of every host's rows only this one's are known here; the others hold about as much.
  share = bucket.batch / len(batch["segment"])
  numbers = [np.unique(row[row >= 0], return_counts=True)[1] for row in batch["segment"]]
  found = [parts.work(replace(bucket, frames=1 + parts.codec.temporal * (int(f) - 1), batch=1))
           for lengths in numbers for f in lengths]
  return round(share * sum(tokens for tokens, _ in found)), share * sum(flops for _, flops in found)


class Account(NamedTuple):
  """What a step of a bucket takes of each device, in bytes.

  kept: state and batch; worked: beside them, at most; host: in its host's memory; sent: collectives; None if the
  compiler found it too large; hidden: of `traffic`.
  """

  kept: int
  worked: int
  host: int
  sent: dict[str, Sent] | None
  hidden: tuple[int, int] = (0, 0)


def account(parts: Parts, config: ConfigDict, bucket: Bucket) -> Account:
  """Compiles the training step of a bucket for the devices of the parts' mesh, which need not be here."""
  chain, _ = optimizer.build(parts.optimizer, abstract_trained(parts))
  abstract, _ = training_state(parts, chain)
  there = parts.of(bucket)
  run = compiled_step(there, chain, abstract)
  given = (placement.viewed(abstract, there.mesh), abstract_batch(there, bucket),
           placement.viewed(abstract_frozen(parts, config), there.mesh))
  lowered, aside, most = run.lower(*given), 0, 0
  if parts.offload:  # all may be on the device while parameters change; by then nothing is kept of the forward pass
    aside = sum(targets.held(x) for x in jax.tree.leaves((abstract.opt, abstract.ema)) if x.ndim)
    most = aside + sum(map(targets.held, jax.tree.leaves(abstract.params)))
  try:
    program = lowered.compile(targets.options(parts.mesh))
  except jax.errors.JaxRuntimeError as error:
    kept = sum(targets.held(leaf) for leaf in jax.tree.leaves(given)) - aside
    return Account(kept, targets.wanted(error, kept), aside, None)
  text = program.as_text()
  return Account(*targets.memory(program, parts.mesh, aside, most), traffic.sent(text), traffic.hidden(text))


def estimated(parts: Parts, config: ConfigDict, bucket: Bucket) -> memory.Estimate:
  """What the training step of a bucket takes by formulas; nothing is compiled."""
  chain, _ = optimizer.build(parts.optimizer, abstract_trained(parts))
  abstract, _ = training_state(parts, chain)
  there, (f, n), network = parts.of(bucket), parts.frame_tokens(bucket), parts.network
  mesh = there.mesh
  tensor, size = mesh.shape["tensor"], parts.size
  clips = bucket.batch // meshes.batch_shards(mesh) // parts.method.micro_batches
  scheme, own_f, own_n = PATTERNS[network.pattern], -(-f // mesh.shape["clip"]), -(-n // mesh.shape["seq"])
  gathered = sum(halo.reach(sight.parse(network.mask, f), own_f, mesh.shape["clip"])) if scheme.nearby else 0
  _, together = scheme.split(mesh, size.heads)
  work = memory.Work(size, clips * own_f * own_n, (own_f + gathered) * own_n * together,
                     jnp.dtype(network.dtype).itemsize, network.remat, network.kernel, mesh.devices.flat[0].platform,
                     tensor, parts.method.micro_batches, parts.lora is None, clips * gathered * own_n)
  return memory.estimate(work, abstract, abstract_batch(there, bucket), abstract_frozen(parts, config), parts.offload)


def dry_run(config: ConfigDict, say: Callable[[str], None] = print, target: str = "", compiled: bool = True) -> None:
  """Says what a run would take, from formulas and the compiled step, and starts nothing.

  target: as "h200:8" or "v5p:2x2x4", devices to compile for that are not here; by default those that are. compiled:
  or from formulas alone, at once.
  """
  parts = assemble(config, devices=targets.devices(target) if target else None)
  say(f"mesh        {meshes.describe(parts.of(parts.buckets[0]).mesh)}" + (f", {target}" if target else ""))
  say(f"network     {parameters(parts)}")
  for bucket in parts.buckets:
    (f, n), (tokens, flops) = parts.frame_tokens(bucket), parts.work(bucket)
    what = (f"bucket      {bucket}: {f} frames x {n} tokens x {bucket.batch} clips = {tokens:,} tokens a step, "
            f"{flops:.3g} model FLOPs a step, {flops / parts.mesh.size:.3g} a device")
    formula = estimated(parts, config, bucket)
    if not compiled:
      say(what)
      say(f"estimate    {memory.describe(formula)}")
      if target:
        say(f"fits        {targets.verdict(target, round(formula.total))}")
      continue
    kept, worked, host, sent, hidden = account(parts, config, bucket)
    say(f"{what}; memory of a device {(kept + worked) / 2**20:.1f} MiB: {kept / 2**20:.1f} state and batch, "
        f"{worked / 2**20:.1f} at work" + (f"; {host / 2**20:.1f} MiB of its host's" if host else ""))
    say(f"estimate    {memory.describe(formula)}")
    if target:
      say(f"fits        {targets.verdict(target, kept + worked)}")
    if sent is not None:
      say(f"sends       {traffic.describe(sent, hidden)}")
  for line in advised.lines(parts, config):
    say(f"advice      {line}")
