"""Every file ends as a film that can be read, or as refused for the right reason; films are shown as they are meant."""

import os
import signal
import socket
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from curation import frames, probe, tone
from curation.items import Film, Rejected
from planted import pattern, store

from anisora_jax import errors
from anisora_jax.loaders import video

SETTINGS = probe.Settings()


@pytest.fixture(autouse=True)
def no_waiting():
  """A test that waits for ever fails after 30 s."""
  before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("waited too long")))
  signal.alarm(30)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)


def look(path, name=None):
  return probe.probe(path, name or path.name, SETTINGS)


def pictures(film, **kwargs):
  numbers, shown = zip(*frames.paced(film, **kwargs), strict=True)
  return list(numbers), np.stack(shown)


def test_a_plain_film_is_told_in_full_and_comes_back_frame_by_frame(tmp_path):
  made = pattern(30)
  film = look(store(tmp_path / "a.mp4", made, rate=Fraction(24000, 1001)))
  assert (film.codec, film.height, film.width, film.frames, film.repairs) == ("h264", 64, 96, 30, ())
  assert film.fps == pytest.approx(24000 / 1001, rel=1e-9) and film.bytes == (tmp_path / "a.mp4").stat().st_size
  numbers, shown = pictures(film)
  assert numbers == list(range(30)) and np.abs(shown.astype(int) - made).mean() < 3
  small = pictures(film, height=32)[1]
  area = np.stack([cv2.resize(each, (48, 32), interpolation=cv2.INTER_AREA) for each in made])
  assert small.shape == (30, 32, 48, 3) and np.abs(small.astype(int) - area).mean() < 3


@pytest.mark.parametrize("suffix, codec", [("mp4", "libx264"), ("mkv", "libx264"), ("ts", "libx264"), ("avi", "mpeg4"),
                                           ("webm", "libvpx-vp9"), ("mp4", "libx265"), ("mpg", "mpeg2video")])
def test_any_stretch_is_the_same_as_in_the_whole_film(tmp_path, suffix, codec):
  options = {"g": "12", "bf": "2"} if codec not in ("libvpx-vp9", "libx265") else {"g": "12"}
  film = look(store(tmp_path / f"a.{suffix}", pattern(150), codec=codec, options=options))
  assert isinstance(film, Film) and film.frames == 150, film
  whole = pictures(film, height=32)[1]
  for start, stop in ((0, 3), (37, 41), (60, 62), (107, 150), (149, 150)):
    numbers, shown = pictures(film, start=start, stop=stop, height=32)
    assert numbers == list(range(start, stop)) and np.array_equal(shown, whole[start:stop]), (start, stop)


def test_more_frames_than_there_are_is_an_error_and_not_fewer_frames(tmp_path):
  film = look(store(tmp_path / "a.mp4", pattern(20)))
  with pytest.raises(video.Unreadable, match="frame 20 is wanted"):
    pictures(film, start=10, stop=30)


def hostile(folder):
  """name -> (path, the reason it must be refused for)"""
  def wrote(name, content):
    (folder / name).write_bytes(content)
    return folder / name
  good = store(folder / "good.mp4", pattern(48)).read_bytes()
  os.mkfifo(folder / "pipe.mp4")
  (folder / "loop.mp4").symlink_to(folder / "loop2.mp4")
  (folder / "loop2.mp4").symlink_to(folder / "loop.mp4")
  (folder / "folder.mp4").mkdir()
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(str(folder / "socket.mp4"))
  concat = b"ffconcat version 1.0\nfile good.mp4\n"
  playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{folder}/good.mp4\n#EXT-X-ENDLIST\n".encode()
  return {
    "empty": (wrote("empty.mp4", b""), "empty"),
    "missing": (folder / "missing.mp4", "not_opened"),
    "a name too long": (folder / ("x" * 300), "not_opened"),
    "pipe": (folder / "pipe.mp4", "not_a_file"),
    "socket": (folder / "socket.mp4", "not_a_file"),
    "folder": (folder / "folder.mp4", "not_a_file"),
    "device": (folder / "../../../../../../../../dev/zero", "not_a_file"),
    "links in a ring": (folder / "loop.mp4", "not_opened"),
    "text": (wrote("text.mp4", b"dear diary,\n" * 500), "not_a_film"),
    "noise": (wrote("noise.mp4", np.random.default_rng(0).bytes(20000)), "not_a_film"),
    "list of films": (wrote("concat.mp4", concat), "not_a_film"),
    "playlist": (wrote("playlist.mp4", playlist), "not_a_film"),
    "cut off before its index": (wrote("short.mp4", good[:len(good) // 2]), "not_a_film"),
    "a drawing": (wrote("drawing.mp4", cv2.imencode(".png", pattern(1)[0])[1].tobytes()), "not_a_film"),
    "sound only": (sound(folder / "sound.m4a"), "no_video"),
    "one by one": (store(folder / "tiny.mkv", pattern(10)[:, :1, :1], codec="ffv1", pixels="bgr0"), "too_small"),
    "a ribbon": (store(folder / "ribbon.mkv", np.tile(pattern(5)[:, :40], (1, 1, 3, 1)), codec="ffv1",
                       pixels="bgr0"), "odd_shape"),
    "one picture": (store(folder / "one.mp4", pattern(1)), "still"),
    "a slide show": (store(folder / "slides.mp4", pattern(5), rate=Fraction(1, 2)), "too_slow"),
    "slanted": (store(folder / "slanted.mp4", pattern(9), turn=30), "slanted"),
    "a size that lies": (wrote("bomb.y4m", b"YUV4MPEG2 W60000 H60000 F25:1 C420jpeg\nFRAME\n" + bytes(999)),
                         "not_a_film"),
  }


def sound(path):
  with av.open(str(path), "w", format="mp4") as container:
    stream = container.add_stream("aac", rate=44100)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
    frame.sample_rate = 44100
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return path


def test_what_is_no_film_is_refused_with_its_reason(tmp_path):
  for case, (path, reason) in hostile(tmp_path).items():
    found = probe.probe(path, case, SETTINGS)
    assert isinstance(found, Rejected) and (found.reason, found.what) == (reason, case), (case, found)
    assert found.reason in probe.REASONS and found.detail and "\n" not in found.detail, (case, found)


@pytest.mark.parametrize("name", ["-i.mp4", "a'b\"c.mp4", "new\nline.mp4", "$(touch owned).mp4", "`id`.mp4", "%03d.mp4",
                                  "<b onload=x>.mp4", "concat:a.mp4", "http:--x.mp4", "file:a.mp4", "ä ö.mp4", "a;b|c"])
def test_a_name_is_only_a_name(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)  # a leading dash or a protocol would show only in a relative path
  path = store(tmp_path / "plain.mp4", pattern(6)).rename(tmp_path / name)
  film = probe.probe(path.relative_to(tmp_path), name, SETTINGS)
  assert isinstance(film, Film) and film.name == name and len(list(frames.paced(film))) == 6
  assert [each.name for each in tmp_path.iterdir()] == [name]


def test_a_name_that_is_no_text_is_read_too(tmp_path):
  path = store(tmp_path / "plain.mp4", pattern(6)).rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4"))
  assert isinstance(look(path), Film)


@pytest.mark.parametrize("turn, flip", [(90, False), (180, False), (270, False), (0, True), (90, True), (270, True)])
def test_films_stand_upright_as_the_display_matrix_says(tmp_path, turn, flip):
  made = pattern(8)
  film = look(store(tmp_path / "a.mp4", made, turn=turn, flip=flip))
  want = np.rot90(made, turn // 90, axes=(1, 2))  # PyAV turns counter-clockwise, then mirrors
  want = want[:, :, ::-1] if flip else want
  shown = pictures(film)[1]
  assert film.repairs == ("rotated",) and (film.height, film.width) == want.shape[1:3]
  assert np.abs(shown.astype(int) - want).mean() < 3
  small = pictures(film, height=32)[1]
  assert small.shape[1] == 32 and np.abs(small[0].mean((0, 1)) - shown[0].mean((0, 1))).max() < 2


def test_pixels_become_square(tmp_path):
  film = look(store(tmp_path / "a.mp4", pattern(8), pixel=Fraction(4, 3)))
  assert film.repairs == ("anamorphic",) and (film.height, film.width) == (64, 128)
  want = cv2.resize(pattern(8)[0], (128, 64), interpolation=cv2.INTER_LINEAR)
  assert np.abs(pictures(film)[1][0].astype(int) - want).mean() < 4


def test_an_odd_row_and_column_are_left_out(tmp_path):
  made = pattern(8)[:, :63, :95]
  for name, kind in (("a.mkv", "yuv420p"), ("b.mkv", "bgr0"), ("c.mkv", "yuv420p10le")):
    film = look(store(tmp_path / name, made, codec="ffv1", pixels=kind))
    assert film.repairs == ("odd_size",) and (film.height, film.width) == (62, 94)
    assert np.abs(pictures(film)[1].astype(int) - made[:, :62, :94]).mean() < 3, kind


def test_varying_rates_are_paced_by_the_clock(tmp_path):
  made, times = pattern(40), [0]
  for n in range(39):
    times.append(times[-1] + (4 if n % 10 == 3 else 1))  # now and then a picture stays for four
  film = look(store(tmp_path / "a.mp4", made, times=times, rate=24))
  assert film.repairs == ("variable_rate",) and film.fps == 24 and film.frames == times[-1] + 1
  shown = pictures(film)[1]
  owner = np.searchsorted(times, np.arange(film.frames), side="right") - 1  # the latest picture that is not later
  assert np.abs(shown.astype(int) - made[owner]).mean() < 3
  assert np.array_equal(pictures(film, start=33, stop=50)[1], shown[33:50])


def test_clocks_in_milliseconds_are_still_of_constant_rate(tmp_path):
  film = look(store(tmp_path / "a.mkv", pattern(50), rate=Fraction(24000, 1001)))
  assert film.repairs == () and film.fps == pytest.approx(24000 / 1001, rel=1e-6) and film.frames == 50


def test_absurd_rates_are_thinned_evenly(tmp_path):
  film = look(store(tmp_path / "a.mp4", pattern(400), rate=10000))
  assert film.repairs == ("capped_rate",) and 30 < film.fps <= 60 and film.frames == 3
  for rate, every in ((120, 2), (180, 3)):
    film = look(store(tmp_path / f"{rate}.mp4", made := pattern(60), rate=rate))
    count = 60 // every
    shown = pictures(film)[1].astype(int)
    assert film.fps == 60 and len(shown) == film.frames and film.frames - count in (0, 1)  # the last may round up
    shown = shown[:count]
    assert np.abs(shown - made[::every]).mean() < np.abs(shown - made[1::every]).mean()


def test_a_pause_of_years_does_not_make_years_of_frames(tmp_path):
  times = [*range(20), 10**8, 10**8 + 1]
  assert look(store(tmp_path / "a.mkv", pattern(22), times=times, rate=24)).reason == "too_slow"


def test_without_a_clock_pictures_are_counted(tmp_path):
  path = store(tmp_path / "a.h264", pattern(30), container="h264")
  film = look(path)
  assert film.repairs == ("untimed",) and film.frames == 30
  assert pictures(film, start=10, stop=20)[0] == list(range(10, 20))


def test_what_is_cut_off_is_kept_as_far_as_it_goes(tmp_path):
  for name, container in (("a.ts", "mpegts"), ("a.mkv", "matroska"), ("a.mp4", "mp4")):
    path = store(tmp_path / name, pattern(120), container=container, options={"g": "12"}, front=container == "mp4")
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * .6)])
    film = look(path)
    assert isinstance(film, Film), (name, film)
    numbers, shown = pictures(film)
    assert 40 < len(numbers) < 90 and np.abs(shown[:40].astype(int) - pattern(120)[:40]).mean() < 3, name
    assert len(numbers) <= film.frames and (container == "mpegts" or "truncated" in film.repairs), (name, film)


def test_bit_rot_ends_in_a_film_or_a_reason_and_damaged_pictures_are_not_shown(tmp_path):
  made, rng, ends = pattern(60), np.random.default_rng(0), set()
  content = bytearray(store(tmp_path / "good.mp4", made).read_bytes())
  for trial in range(60):
    rotten = bytearray(content)
    index = len(rotten) - 1200 if trial % 2 else 0  # the index lies at the end, and rots every other time
    for place in rng.integers(index, len(rotten), 1 + trial // 4):
      rotten[place] ^= 1 << rng.integers(8)
    (tmp_path / "rot.mp4").write_bytes(rotten)
    film = look(tmp_path / "rot.mp4")
    if isinstance(film, Rejected):
      ends.add(film.reason)
      continue
    try:
      numbers = [n for n, _ in frames.paced(film)]
    except video.Unreadable:
      ends.add("unreadable")
      continue
    assert numbers == list(range(len(numbers))) and len(numbers) <= film.frames
    ends.add("film")
  assert "film" in ends and ends <= {"film", "unreadable", *probe.REASONS}, ends


@pytest.mark.parametrize("transfer, code", [(tone.PQ, .5806), (tone.HLG, .75)])
def test_hdr_white_becomes_bright_and_dark_stays_dark(tmp_path, transfer, code):
  """ITU-R BT.2408: reference white, 203 nits, is 58 % of PQ and 75 % of HLG; the same light must look the same."""
  grey = np.full((64, 96, 3), round(code * 65535), np.uint16)
  grey[:, :32] = 0
  film = look(store(tmp_path / "a.mp4", np.stack([grey] * 4), codec="libx265", pixels="yuv420p10le", transfer=transfer))
  assert film.repairs == ("hdr",)
  shown = pictures(film)[1][0]
  want = 255 * float(tone.moebius(np.float64(1))) ** (1 / 2.4)
  assert 200 < want < 240 and np.abs(shown[8:-8, 44:-8].astype(int) - want).max() <= 4
  assert shown[8:-8, 4:24].max() <= 3


def test_tone_curve_is_straight_then_bends_without_a_kink_up_to_white():
  light = np.linspace(0, tone.PEAK, 10001)
  shown = tone.moebius(light)
  assert np.allclose(shown[light <= tone.KNEE], light[light <= tone.KNEE]) and shown[-1] == pytest.approx(1, abs=1e-6)
  slope = np.diff(shown) / np.diff(light)
  assert slope.min() > 0 and np.abs(np.diff(slope)).max() < .01


def test_ten_bits_of_ordinary_range_are_not_tone_mapped(tmp_path):
  made = pattern(6)
  film = look(store(tmp_path / "a.mp4", made, codec="libx265", pixels="yuv420p10le"))
  assert film.repairs == () and np.abs(pictures(film)[1].astype(int) - made).mean() < 4


def test_settings_say_what_is_allowed():
  with pytest.raises(errors.BadInput, match=r"probe.fastest is 1000: allowed are 24 to 240"):
    probe.Settings(fastest=1000)
