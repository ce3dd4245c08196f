"""A film's frames as they are shown: upright, square pixels, SDR, even sides, at a constant rate.

Frame n of a film is what is on the screen at n / fps seconds after its first picture: the picture whose time, rounded
to frames, is n, or else the latest before. Films of constant rate so give every picture once; where pictures are
missing or the rate varies, the one before is held, and of pictures that come faster than fps the nearest is shown.

Only bytes of a regular file reach FFmpeg, through a handle, never a name, and only the containers named here: so
nothing in a name is a protocol or an option, and no playlist inside a file opens another one.
"""

import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import UInt8

from anisora_jax.loaders import video
from curation import tone
from curation.items import Film

CONTAINERS = "mov,matroska,avi,asf,flv,mpegts,mpeg,mpegvideo,ogg,mxf,nut,ivf,yuv4mpegpipe,gif,h264,hevc,obu,rm,dv"
LARGEST = 2**26   # pixels of a picture that a decoder may be asked for: 8192 x 8192
BUFFER = 2**17    # bytes read at once
# Titles that are no text refuse no film; later PyAV lets them pass without being asked, and cannot be asked.
_TITLES = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
_SCALER = VideoReformatter()
# Exact, so that all machines make the same bytes.
_AREA = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
MARGINS = (0., 10.)  # seconds before the wanted frame at which decoding starts, tried in turn; then from the first


# What reading a damaged file raises; IndexError is PyAV's, where a stream turns up that the file did not announce.
DAMAGE = (av.error.FFmpegError, OSError, IndexError)


class Refused(video.Unreadable):
  """A file that is no film to us. reason: a word of probe.REASONS."""

  def __init__(self, reason: str, detail: str):
    super().__init__(detail)
    self.reason = reason


class _Bytes:
  """A file without its name: FFmpeg guesses by extension otherwise."""

  def __init__(self, file):
    self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _no_other_file(url, *_):
  raise PermissionError(f"a film that asks for another file: {url!r}")


@contextmanager
def opened(path: Path, threads: int = 1) -> Iterator:
  """Opens a film and gives its first video stream that is no cover. Raises Refused.

  threads: of the decoder; 0 lets FFmpeg choose.
  """
  try:
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise Refused("not_a_file", "not a regular file")
    # Without waiting: should a pipe have taken the file's place meanwhile, it reads as empty.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0)
  except OSError as error:
    raise Refused("not_opened", f"cannot be opened ({error.strerror})") from error
  with file:
    if os.fstat(file.fileno()).st_size == 0:
      raise Refused("empty", "empty file, 0 bytes")
    try:
      container = av.open(_Bytes(file), buffer_size=BUFFER, io_open=_no_other_file,
                          container_options={"format_whitelist": CONTAINERS}, **_TITLES)
    except (av.error.FFmpegError, OSError, ValueError) as error:
      why = getattr(error, "strerror", None) or str(error)
      raise Refused("not_a_film", f"not a film, or cut off before its index ({why})") from error
    with container:
      streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
      if not streams:
        raise Refused("no_video", "no video stream" + (", only sound" if container.streams.audio else ""))
      stream = streams[0]
      if stream.codec_context is None:
        raise Refused("undecodable", "pictures in an encoding that FFmpeg does not know")
      stream.codec_context.options = {"max_pixels": str(LARGEST)}
      stream.codec_context.thread_count = threads
      stream.thread_type = "AUTO" if threads != 1 else "NONE"
      yield stream


def decoded(stream) -> Iterator[av.VideoFrame]:
  """Pictures in the order shown, up to the first damage after the first good one, which raises video.Unreadable.

  What cannot be decoded before the first good picture is passed over: recordings begin between key frames.
  """
  count = 0
  try:
    for packet in stream.container.demux(stream):
      try:
        pictures = packet.decode()
      except av.error.FFmpegError:
        if count:
          raise
        continue
      for picture in pictures:
        if picture.is_corrupt:
          raise video.Unreadable(f"damaged at picture {count}")
        yield picture
        count += 1
  except DAMAGE as error:
    why = getattr(error, "strerror", None) or str(error)
    raise video.Unreadable(f"damaged after picture {count} ({why})") from error
  if not count:
    raise video.Unreadable("no picture can be decoded")


def _numbered(film: Film, stream, pictures: Iterator[av.VideoFrame], zero: int | None
              ) -> Iterator[tuple[float, av.VideoFrame]]:
  """Gives each picture its time in frames of the film. zero: time stamp of the film's first picture, if known."""
  untimed = "untimed" in film.repairs
  for count, picture in enumerate(pictures):
    if untimed or picture.pts is None:
      yield count, picture
      continue
    zero = picture.pts if zero is None else zero
    yield float((picture.pts - zero) * stream.time_base) * film.fps, picture


def _from(film: Film, start: int) -> Iterator[tuple[float, av.VideoFrame]]:
  """Pictures with their times from one shown at frame `start` or earlier on."""
  if start > 0 and "untimed" not in film.repairs:
    for margin in MARGINS:
      if start / film.fps <= margin + 1:
        break
      with opened(Path(film.path)) as stream:
        try:
          zero = next(decoded(stream)).pts
          stream.container.seek(zero + round((start / film.fps - margin) / stream.time_base), stream=stream)
          numbered = _numbered(film, stream, decoded(stream), zero)
          first = next(numbered)
        except (*DAMAGE, video.Unreadable):
          continue
        if first[0] < start + .5:
          yield first
          yield from numbered
          return
  with opened(Path(film.path)) as stream:
    yield from _numbered(film, stream, decoded(stream), None)


def pictures(film: Film, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, av.VideoFrame]]:
  """Frames of the timeline as decoded pictures; a picture that is held comes again, the same object.

  Without `stop`, up to the last frame that can be decoded. Raises video.Unreadable where there is none, or where
  `stop` asks for more than there is.
  """
  stop, asked = (film.frames, False) if stop is None else (stop, True)
  number, held, why = start, None, "the film ends"
  try:
    for time, picture in _from(film, start):
      place, off = math.floor(time + .5), abs(time - math.floor(time + .5))
      while held is not None and number < min(place, stop):
        yield number, held[1]
        number += 1
      if number >= stop:
        return
      # Of several pictures for one frame the nearest is shown.
      if held is None or place > held[0] or (place == held[0] and off <= held[2]):
        held = (place, picture, off)
  except Refused:
    raise
  except video.Unreadable as error:
    why = str(error)
  if held is not None and held[0] <= number < stop:
    yield number, held[1]
    number += 1
  if number == start or (asked and number < stop):
    raise video.Unreadable(f"frame {number} is wanted, but cannot be had: {why}")


def turn_of(picture: av.VideoFrame) -> tuple[int, bool]:
  """Quarter turns, counter-clockwise, and whether to mirror left and right before them, as the display matrix says.

  Raises Refused for a slanted picture.
  """
  matrix = picture.side_data.get("DISPLAYMATRIX")
  if matrix is None:
    return 0, False
  a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32)[:9] / 65536
  mirrored = a * d - b * c < 0
  quarter = math.atan2(-b, a) / (math.pi / 2) if not mirrored else math.atan2(b, -a) / (math.pi / 2)
  if abs(quarter - round(quarter)) > .01:
    raise Refused("slanted", f"turned by {90 * quarter:.0f} degrees")
  return round(quarter) % 4, mirrored


def shown(picture: av.VideoFrame, film: Film, height: int | None = None) -> UInt8[np.ndarray, "h w 3"]:
  """One picture as it is shown. height: rows wanted, even; the film's own if None."""
  rows, columns = film.height, film.width
  if height is not None:
    rows, columns = height, max(2, round(film.width * height / film.height / 2) * 2)
  turns, mirrored = turn_of(picture)
  if turns % 2:
    rows, columns = columns, rows
  pixels = _scaled(picture, video.Size(rows, columns))
  if mirrored:
    pixels = pixels[:, ::-1]
  return np.ascontiguousarray(np.rot90(pixels, turns))


def _scaled(picture: av.VideoFrame, size: video.Size) -> UInt8[np.ndarray, "h w 3"]:
  """The whole picture at `size`, whatever the shape of its pixels, in SDR."""
  same = (picture.height // 2 * 2, picture.width // 2 * 2) == size  # an odd row or column is cut off, not blurred away
  rows, columns = (picture.height, picture.width) if same else size
  if tone.is_hdr(picture):
    codes = _SCALER.reformat(picture, columns, rows, "rgb48le", interpolation=_AREA, threads=1).to_ndarray()
    return tone.to_sdr(codes, int(picture.color_trc))[:size.height, :size.width]
  if (picture.height, picture.width) != size:
    # FFmpeg shrinks four times as fast as OpenCV; the colours stay the business of video.rgb.
    picture = _SCALER.reformat(picture, columns, rows, "yuv444p", interpolation=_AREA, threads=1)
  return video.rgb(picture)[:size.height, :size.width]


def paced(film: Film, start: int = 0, stop: int | None = None, height: int | None = None
          ) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
  """Frames [start, stop) as RGB, with their numbers. A frame that is held comes again, the same array: do not write.

  height: rows wanted, even; the width follows the film's shape. See `pictures` for where it ends and what it raises.
  """
  last, pixels = None, None
  for number, picture in pictures(film, start, stop):
    if picture is not last:
      last, pixels = picture, shown(picture, film, height)
    yield number, pixels
