"""Films to frames and back: decode, crop, pace, encode. Frames are uint8 [F, H, W, 3], 0 .. 255, red first.

Colour is computed on the planes FFmpeg decoded, after they were cropped and resized: brightness and the two colour
planes go straight to the wanted size, and one 3x4 matrix makes red, green and blue. That is several times cheaper than
asking FFmpeg for full-size RGB, and it treats BT.601 and BT.709, studio and full range, by the same line.
"""

import io
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
from jaxtyping import Bool, Int, UInt8

Frames = UInt8[np.ndarray, "F H W 3"]

# Brightness shares (red, blue) by FFmpeg's number of the colour space; unspecified (2) reads as BT.601, as in FFmpeg.
# From: ITU-R BT.601, BT.709, BT.2020 and SMPTE 240M.
_SHARES = {1: (.2126, .0722), 2: (.299, .114), 4: (.3, .11), 5: (.299, .114), 6: (.299, .114), 7: (.212, .087),
           9: (.2627, .0593)}
_FULL_RANGE = 2
_PLANAR = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"}


class Unreadable(ValueError):
  """A film or clip that cannot be decoded. The message is the reason, without the name."""


class TooShort(Unreadable):
  """A clip with fewer frames than are wanted of it, and nothing wrong with it."""


class Facts(NamedTuple):
  """What a container says of its film. frames: 0 where it does not say. fps: mean over the film."""
  fps: float
  frames: int
  height: int
  width: int


class Size(NamedTuple):
  """Rows and columns wanted. The picture is scaled until it covers them and cut evenly on both sides."""
  height: int
  width: int


@contextmanager
def opened(source: Path | bytes, threads: int = 1) -> Iterator:
  """Opens a film file, or one in memory, and gives its first video stream.

  threads: of the decoder; 0 lets FFmpeg choose. Raises Unreadable, also for pipes and devices, on which FFmpeg would
  wait for ever.
  """
  if isinstance(source, Path):
    if not stat.S_ISREG(os.stat(source).st_mode):
      raise Unreadable("not a regular file")
    if source.stat().st_size == 0:
      raise Unreadable("empty file, 0 bytes")
  try:
    container = av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source))
  except av.error.FFmpegError as error:
    raise Unreadable(f"not a film, or cut off before its index ({error.strerror})") from error
  with container:
    if not container.streams.video:
      raise Unreadable("no video stream" + (", only sound" if container.streams.audio else ""))
    stream = container.streams.video[0]
    stream.codec_context.thread_count = threads
    stream.thread_type = "AUTO" if threads != 1 else "NONE"
    yield stream


def facts(source: Path | bytes) -> Facts:
  """Size, rate and length as the container states them. Raises Unreadable."""
  with opened(source) as stream:
    rate = stream.average_rate or stream.guessed_rate
    if not rate or not stream.height or not stream.width:
      raise Unreadable("the container states no frame rate or size")
    return Facts(float(rate), stream.frames, stream.height, stream.width)


def pictures(source: Path | bytes, threads: int = 1) -> Iterator[av.VideoFrame]:
  """Decoded frames in the order shown. Raises Unreadable at the first damaged one, and where a film ends too early."""
  with opened(source, threads) as stream:
    count = 0
    try:
      for picture in stream.container.decode(stream):
        if picture.is_corrupt:
          raise Unreadable(f"frame {count} is damaged")
        yield picture
        count += 1
    except av.error.FFmpegError as error:
      raise Unreadable(f"damaged after frame {count} ({error.strerror})") from error
    if count < max(stream.frames, 1):
      raise Unreadable(f"cut off: {count} of {max(stream.frames, 1)} frames can be decoded")


def frames(source: Path | bytes, indices: Int[np.ndarray, "F"] | Sequence[int], size: Size | None = None) -> Frames:
  """Decodes chosen frames of one film, rising indices (repeats allowed), scaled and cropped to `size`.

  Decoding stops after the last wanted frame; frames between are decoded but not converted. Raises Unreadable.
  """
  wanted = np.asarray(indices)
  out: list[np.ndarray] = []
  for number, picture in enumerate(pictures(source)):
    if number == wanted[len(out)]:
      made = rgb(picture, size)
      out += [made] * int(np.searchsorted(wanted, number, side="right") - len(out))
    if len(out) == len(wanted):
      return np.stack(out)
  raise Unreadable(f"frame {wanted[len(out)]} was wanted of {number + 1}")


def rgb(picture: av.VideoFrame, size: Size | None = None) -> UInt8[np.ndarray, "H W 3"]:
  """One decoded picture as RGB, scaled to cover `size` and cut evenly; at its own size where none is given."""
  size = size or Size(picture.height, picture.width)
  if picture.format.name not in _PLANAR:
    return fit(picture.to_ndarray(format="rgb24"), size)
  top, left, height, width = _window(picture.height, picture.width, size)
  planes = []
  for plane in picture.planes:
    down, across = picture.height // plane.height, picture.width // plane.width
    whole = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    part = whole[top // down:-(-(top + height) // down), left // across:min(plane.width, -(-(left + width) // across))]
    planes.append(_spread(part, size) if across == 2 else _resized(part, size))
  return cv2.transform(cv2.merge(planes), _matrix(int(picture.colorspace), picture.color_range == _FULL_RANGE))


def _matrix(colorspace: int, full: bool) -> np.ndarray:
  """The 3x4 matrix from (Y', Cb, Cr) bytes to (R, G, B) bytes."""
  red, blue = _SHARES.get(colorspace, _SHARES[2])
  green = 1 - red - blue
  rows = np.array([[1, 0, 2 * (1 - red)],
                   [1, -2 * blue * (1 - blue) / green, -2 * red * (1 - red) / green],
                   [1, 2 * (1 - blue), 0]])
  scale, black = ((1., 1., 1.), 0.) if full else ((255 / 219, 255 / 224, 255 / 224), 16.)
  rows = rows * scale
  return np.hstack([rows, -rows @ [[black], [128], [128]]])


def _planes(pixels: UInt8[np.ndarray, "H W 3"]) -> np.ndarray:
  """RGB to the three planes of yuv420p, BT.601, studio range, one above the other as PyAV takes them."""
  back = np.linalg.inv(_matrix(6, False)[:, :3])
  planes = cv2.transform(pixels, np.hstack([back, [[16], [128], [128]]]))
  # A sample of colour lies on an even column, between two rows.
  colour = cv2.sepFilter2D(planes[..., 1:], -1, np.array([.25, .5, .25]), np.array([.5, .5]), anchor=(1, 0))[::2, ::2]
  parts = [planes[..., 0], colour[..., 0], colour[..., 1]]
  return np.concatenate([part.ravel() for part in parts]).reshape(-1, pixels.shape[1])


def _window(height: int, width: int, size: Size) -> tuple[int, int, int, int]:
  """The largest centred window (top, left, height, width) of a picture that has the shape of `size`; corners even."""
  scale = min(height / size.height, width / size.width)
  inner = min(height, round(size.height * scale)), min(width, round(size.width * scale))
  # Even corners keep the colour planes, which have half the rows and columns, in register.
  return (height - inner[0]) // 4 * 2, (width - inner[1]) // 4 * 2, *inner


def _resized(picture: np.ndarray, size: Size) -> np.ndarray:
  if picture.shape[:2] == size:
    return picture
  shrinks = picture.shape[0] >= size.height and picture.shape[1] >= size.width
  return cv2.resize(picture, (size.width, size.height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _spread(plane: np.ndarray, size: Size) -> np.ndarray:
  """Resizes a colour plane of half the columns, whose samples lie on the even columns as H.264 has it, not between."""
  down, across = plane.shape[0] / size.height, plane.shape[1] / size.width
  if max(down, across) > 1:
    # Shrinking needs the mean of an area; the quarter of a sample that this ignores is less than that of a pixel.
    return _resized(plane, size)
  source = np.float32([[across, 0, across / 2 - .25], [0, down, down / 2 - .5]])
  return cv2.warpAffine(plane, source, (size.width, size.height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                        borderMode=cv2.BORDER_REPLICATE)


def fit(picture: UInt8[np.ndarray, "H W 3"], size: Size) -> UInt8[np.ndarray, "h w 3"]:
  """Scales a picture until it covers `size` and cuts it evenly on both sides."""
  top, left, height, width = _window(*picture.shape[:2], size)
  return _resized(picture[top:top + height, left:left + width], size)


def fit_mask(mask: Bool[np.ndarray, "H W"], size: Size) -> Bool[np.ndarray, "h w"]:
  """The same window and scale as `fit`; a pixel is set where at least half of what falls on it was."""
  top, left, height, width = _window(*mask.shape, size)
  return _resized(mask[top:top + height, left:left + width].astype(np.uint8) * 255, size) >= 128


def pace(fps: float, target: float, count: int, offset: int = 0) -> Int[np.ndarray, "F"]:
  """Indices into a film of `fps` of the `count` frames that play at `target` frames a second from frame `offset` on.

  The nearest earlier frame is taken, so a film slower than `target` repeats frames and no frame is blended.
  """
  # The small push keeps exact multiples, such as every second frame, from falling one short by rounding.
  return offset + np.floor(np.arange(count) * (fps / target) + 1e-6).astype(int)


def paced_length(frames: int, fps: float, target: float) -> int:
  """How many frames at `target` a film of `frames` frames at `fps` holds: the largest count for which `pace` fits."""
  return max(0, int(np.ceil((frames - 1e-6) * (target / fps))))


def encode(film: Frames, fps: float, crf: int = 15) -> bytes:
  """An mp4 of H.264, yuv420p, BT.601: plays everywhere, decodes alone.

  crf: 0 lossless .. 51; 15 is visually clean. Height and width must be even, as yuv420p asks.
  """
  return encode_each(film, Size(*film.shape[1:3]), fps, crf)


def encode_each(film: Iterable[np.ndarray], size: Size, fps: float, crf: int = 15) -> bytes:
  """As `encode`, of frames that come one by one, so that a long clip need not lie in memory. size: theirs.

  The same frames give the same bytes: one thread, and no macroblock tree, whose assembly reads beyond the rows it was
  given, so that what lay in memory changed a few bits (seen at width 144; its use is in long shots anyway).
  """
  out = io.BytesIO()
  with av.open(out, "w", format="mp4") as container:
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001),
                                  options={"crf": str(crf), "preset": "veryfast", "x264-params": "mbtree=0"})
    stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
    stream.codec_context.thread_count = 1
    stream.codec_context.colorspace, stream.codec_context.color_range = 6, 1
    for pixels in film:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(_planes(pixels), format="yuv420p")))
    container.mux(stream.encode(None))
  return out.getvalue()
