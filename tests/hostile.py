"""Files that no one means well, and films that are merely odd, for the tests of curation."""

import io
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def moving(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
  """A textured picture that slides, uint8 [count, height, width, 3]; another seed is another picture."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (12, 16, 3)).astype(np.uint8)
  big = np.kron(small, np.ones((-(-height // 8), -(-width // 8), 1), np.uint8))
  return np.stack([np.roll(big, 2 * number, 1)[:height, :width] for number in range(count)])


def write(path: Path, frames: np.ndarray, rate=12, codec: str = "libx264", form: str = "yuv420p",
          container: str = "mp4", times: list[int] | None = None, **options: str) -> None:
  """Encodes frames. times: pts in ticks of 1/1000 s, for a variable rate."""
  out = io.BytesIO()  # FFmpeg would read some of the names as something else
  with av.open(out, "w", format=container) as file:
    stream = file.add_stream(codec, rate=Fraction(rate), options=options)
    stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], form
    if times:
      stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
    for number, picture in enumerate(frames):
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
      if times:
        frame.pts, frame.time_base = times[number], Fraction(1, 1000)
      file.mux(stream.encode(frame))
    file.mux(stream.encode(None))
  path.write_bytes(out.getvalue())


def _sound(path: Path) -> None:
  with av.open(str(path), "w", format="mp4") as file:
    stream = file.add_stream("aac", rate=44100)
    for number in range(20):
      frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
      frame.sample_rate, frame.pts = 44100, 1024 * number
      file.mux(stream.encode(frame))
    file.mux(stream.encode(None))


def _rotated(source: Path, path: Path) -> None:
  """Writes the display matrix of a quarter turn into the track header of an mp4."""
  data = bytearray(source.read_bytes())
  at = data.index(b"tkhd") + 4 + 40  # version 0: flags, times, id, reserved, layer, volume; then nine numbers
  one = 1 << 16
  matrix = [0, one, 0, -one & 0xFFFFFFFF, 0, 0, 0, 0, 1 << 30]
  data[at:at + 36] = b"".join(number.to_bytes(4, "big") for number in matrix)
  path.write_bytes(bytes(data))


NAMES = ("quote's \"film\".mp4", "new\nline.mp4", "-rf.mp4", "$(touch escaped).mp4", "`touch escaped`.mp4",
         "<img src=x onerror=alert(1)>.mp4", "%2e%2e%2fescaped.mp4", "a;touch escaped.mp4", "名前 🎬.mp4")


def folder(films: Path) -> dict[str, set[str]]:
  """Fills a folder; returns name -> how it may end: "kept", or the reasons of its rejection."""
  films.mkdir(parents=True)
  good = films / "good.mp4"
  write(good, moving(30, 64, 96))
  whole = good.read_bytes()
  (films / "empty.mp4").write_bytes(b"")
  (films / "truncated.mp4").write_bytes(whole[:len(whole) // 2])
  rotten, rng = bytearray(whole), np.random.default_rng(0)
  for at in rng.integers(300, len(rotten) // 3, 40):
    rotten[at] ^= int(rng.integers(1, 256))
  (films / "rotten.mp4").write_bytes(bytes(rotten))
  write(films / "torn.mkv", moving(60, 64, 96, 7), container="matroska")
  (films / "torn.mkv").write_bytes((films / "torn.mkv").read_bytes()[:-1500])
  (films / "text.mp4").write_text("this is no film\n" * 100)
  (films / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
  _sound(films / "sound.mp4")
  os.mkfifo(films / "pipe.mp4")
  os.symlink("loop.mp4", films / "loop.mp4")
  os.symlink("nowhere.mp4", films / "dangling.mp4")
  os.symlink(".", films / "around")
  (films / "folder.mp4").mkdir()
  write(films / "dot.mkv", moving(30, 1, 1), codec="ffv1", form="yuv444p", container="matroska")
  write(films / "fast.mp4", moving(300, 64, 96, 1), rate=10000)
  write(films / "deep.mp4", moving(30, 64, 96, 2), form="yuv420p10le")
  write(films / "hdr.mp4", moving(30, 64, 96, 3), form="yuv420p10le",
        **{"x264-params": "colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"})
  write(films / "odd.mkv", moving(30, 65, 97, 4), codec="ffv1", form="yuv444p", container="matroska")
  _rotated(good, films / "rotated.mp4")
  write(films / "uneven.mp4", moving(30, 64, 96, 5), times=list(np.cumsum([83, 40, 125] * 10)))
  write(films / "still.mp4", np.repeat(moving(1, 64, 96, 6), 30, 0))
  for number, name in enumerate(NAMES):
    write(films / name, moving(30, 64, 96, 10 + number))
  bad = os.fsencode(films) + b"/bytes\xff\xfe.mp4"
  with open(bad, "wb") as file:
    file.write(whole)
  return {
    "good.mp4": {"kept", "copy"}, "empty.mp4": {"empty"}, "truncated.mp4": {"not_a_film"},
    "torn.mkv": {"kept"},
    "rotten.mp4": {"kept", "no_video", "not_a_film", "undecodable", "unreadable", "too_short", "copy"},
    "text.mp4": {"not_a_film"},
    "playlist.mp4": {"not_a_film"}, "sound.mp4": {"no_video"}, "pipe.mp4": {"not_a_file"}, "loop.mp4": {"not_opened"},
    "dangling.mp4": {"not_opened"}, "dot.mkv": {"too_small"}, "fast.mp4": {"static", "too_short"}, "deep.mp4": {"kept"},
    "hdr.mp4": {"kept"}, "odd.mkv": {"kept"}, "rotated.mp4": {"kept"}, "uneven.mp4": {"kept"},
    "still.mp4": {"static"}, **{name: {"kept"} for name in NAMES}, "bytes\\xff\\xfe.mp4": {"kept", "copy"}}
