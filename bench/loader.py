"""Clips per second of the loader against bare PyAV decoding of the same clips, in one run.

  python bench/loader.py --records out/records --bucket 9x32x48@16

Bare decoding is what one would write with PyAV alone: open the clip's mp4 from memory, decode it up to the last frame
the loader needs, and make those that it needs RGB arrays at the film's own size. The loader does the same and besides
reads the record, draws the first frame, scales, crops, unpacks the character's mask and makes the batch. Both run on
one core, in turns, so that other work on the machine disturbs them alike; time is the processor time of this process.
Prints one line; the ratio is the loader's clips per second over those of bare decoding, goal 0.8 and more.
"""

import io
import time
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
from absl import app, flags

from anisora_jax import errors
from anisora_jax.loaders import buckets, mixture, records, video


def bare(clips: list[records.Clip], needed: list[np.ndarray]) -> None:
  """Decodes each clip by PyAV alone and makes the needed frames RGB arrays."""
  for clip, indices in zip(clips, needed, strict=True):
    wanted, out = set(indices.tolist()), []
    with av.open(io.BytesIO(clip.mp4)) as container:
      container.streams.video[0].codec_context.thread_count = 1
      for number, picture in enumerate(container.decode(video=0)):
        if number in wanted:
          out.append(picture.to_ndarray(format="rgb24"))
        if number == indices[-1]:
          break


def seconds(work: Callable[[], None]) -> float:
  """Processor time of this process."""
  start = time.process_time()
  work()
  return time.process_time() - start


def measure(folder: str, bucket: buckets.Bucket, fps: float, rounds: int) -> str:
  """The line to print."""
  cv2.setNumThreads(1)
  batches = mixture.Batches([mixture.Source(folder)], [bucket], fps=fps, threads=0)
  source = records.Records(Path(folder), "train")
  next(batches), next(batches)
  loading, decoding = [], []
  for _ in range(rounds):
    batch = []
    loading.append(seconds(lambda batch=batch: batch.append(next(batches))))
    clips = [source[int(number)] for number in batch[0]["id"]]
    # The middle of where the loader's drawn first frame may lie: on average it decodes as far.
    spans = [video.pace(clip.fps, fps, bucket.frames) for clip in clips]
    needed = [span + (clip.frames - 1 - int(span[-1])) // 2 for clip, span in zip(clips, spans, strict=True)]
    decoding.append(seconds(lambda clips=clips, needed=needed: bare(clips, needed)))
  clips = bucket.batch * rounds
  sizes = f"{source[0].height}x{source[0].width} clips to {bucket.frames}x{bucket.height}x{bucket.width}"
  return (f"loader {clips / sum(loading):.1f} clips/s, bare PyAV {clips / sum(decoding):.1f} clips/s, one core, "
          f"{sizes}: ratio {sum(decoding) / sum(loading):.2f} (goal >= 0.80)")


def main() -> None:
  given = flags.FLAGS
  bucket, = buckets.parse(given.bucket)
  print(measure(given.records, bucket, given.fps, given.rounds))


if __name__ == "__main__":
  flags.DEFINE_string("records", "out/records", "Folder of records, made by data/pack.py.")
  flags.DEFINE_string("bucket", "9x32x48@16", "FRAMESxHEIGHTxWIDTH@BATCH.")
  flags.DEFINE_float("fps", 12, "Frames a second.")
  flags.DEFINE_integer("rounds", 12, "Batches to time.")
  app.run(lambda _: errors.run(main))
