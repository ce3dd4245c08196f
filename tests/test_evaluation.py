"""Likeness against scikit-image and closed forms; the report as a browser's parser reads it."""

import base64
import hashlib
import os
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from anisora_jax.errors import BadInput
from anisora_jax.evaluation import curve, likeness, page

CLIPS = np.random.default_rng(0).integers(0, 256, (3, 5, 6, 8, 3), np.uint8)
TRUTH = np.random.default_rng(1).integers(0, 256, (3, 5, 6, 8, 3), np.uint8)


def test_psnr_is_that_of_scikit_image_clip_by_clip():
  expected = [peak_signal_noise_ratio(truth, clip, data_range=255) for truth, clip in zip(TRUTH, CLIPS, strict=True)]
  np.testing.assert_allclose(likeness.psnr(CLIPS, TRUTH), expected, rtol=1e-12)
  np.testing.assert_allclose(likeness.psnr(CLIPS.astype(np.float32), TRUTH), expected, rtol=1e-12)


def test_psnr_reads_only_where_it_is_told():
  where = np.random.default_rng(2).random((3, 5, 6, 8)) < .4
  expected = [peak_signal_noise_ratio(t[w], c[w], data_range=255) for t, c, w in zip(TRUTH, CLIPS, where, strict=True)]
  np.testing.assert_allclose(likeness.psnr(CLIPS, TRUTH, where), expected, rtol=1e-12)
  outside = np.where(where[..., None], CLIPS, 255 - CLIPS).astype(np.uint8)
  np.testing.assert_array_equal(likeness.psnr(outside, TRUTH, where), likeness.psnr(CLIPS, TRUTH, where))


def test_psnr_of_equal_clips_is_infinite_and_of_no_pixels_refused():
  assert (likeness.psnr(TRUTH, TRUTH) == np.inf).all()
  where = np.ones(TRUTH.shape[:-1], bool)
  where[1] = False
  with pytest.raises(ValueError, match="no pixel of clip 1"):
    likeness.psnr(CLIPS, TRUTH, where)


def test_psnr_ranks_the_nearer_clip_higher():
  near, far = (TRUTH.astype(np.float32) + sign for sign in (2, 9))
  assert (likeness.psnr(near, TRUTH) > likeness.psnr(far, TRUTH)).all()


def test_repeating_the_first_frame_reads_no_other():
  repeated = likeness.repeat_first(CLIPS)
  assert all((repeated[:, f] == CLIPS[:, 0]).all() for f in range(5))


@pytest.mark.parametrize("given", [[0, 4], [4, 0], [0, 2, 4], [0], [4], [1, 3], [0, 1, 2]])
def test_a_cross_fade_follows_a_line_between_given_frames_and_reads_no_other(given):
  faded = likeness.cross_fade(CLIPS, given)
  spoilt = CLIPS.copy()
  spoilt[:, [f for f in range(5) if f not in given]] = 0
  np.testing.assert_array_equal(likeness.cross_fade(spoilt, given), faded)
  for f in range(5):
    before, after = max((g for g in given if g <= f), default=min(given)), min((g for g in given if g >= f),
                                                                               default=max(given))
    share = (f - before) / (after - before) if after > before and before <= f <= after else 0
    left, right = CLIPS[:, before].astype(float), CLIPS[:, after].astype(float)
    np.testing.assert_allclose(faded[:, f], (1 - share) * left + share * right, atol=1e-3)


def test_smoothing_keeps_a_line_and_is_a_mean():
  line = [float(v) for v in range(20)]
  np.testing.assert_allclose(curve.smooth(line, 5)[2:-2], line[2:-2])
  noisy = np.random.default_rng(0).normal(size=30)
  np.testing.assert_allclose(curve.smooth(noisy.tolist(), 5)[15], noisy[13:18].mean())
  assert curve.smooth(line, 1) == line and curve.smooth([], 5) == [] and curve.smooth([3.0], 9) == [3.0]


def test_series_skips_what_was_not_reported_or_not_finite():
  rows = [{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": float("nan")}, {"step": 4, "loss": None},
          {"step": 5, "loss": float("inf")}, {"step": 6, "loss": 1}]
  assert curve.series(rows, "loss") == ([1.0, 6.0], [2.0, 1.0])


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 7.0), (3.1, 3.2), (0.0, 123456.0), (1.0, 1.0),
                                           (-2.0, 9.5)])
def test_ticks_are_few_round_and_inside(low, high):
  found = curve.ticks(low, high)
  assert 1 <= len(found) <= 6 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
  assert len(found) >= 3 or high == low


def points(svg, number):
  """The drawn points of one polyline."""
  return np.array([[float(v) for v in pair.split(",")]
                   for pair in re.findall(r'points="([^"]*)"', svg)[number].split()])


def test_a_curve_is_drawn_where_its_values_are():
  svg = curve.chart("loss", [curve.Line("loss", [0.0, 50.0, 100.0], [1.0, 2.0, 3.0])])
  drawn = points(svg, 0)
  assert drawn[0, 0] == curve.LEFT and drawn[-1, 0] == curve.WIDE - curve.RIGHT
  np.testing.assert_allclose(np.diff(drawn, axis=0)[0], np.diff(drawn, axis=0)[1], atol=.11)
  assert drawn[0, 1] > drawn[-1, 1], "larger values stand higher"
  log = points(curve.chart("loss", [curve.Line("loss", [0.0, 50.0, 100.0], [.01, .1, 1.0])]), 0)
  np.testing.assert_allclose(np.diff(log, axis=0)[0], np.diff(log, axis=0)[1], atol=.11)


def test_a_long_run_makes_a_small_curve_of_the_same_mean():
  values = (np.random.default_rng(0).random(20000) + 1).tolist()
  svg = curve.chart("loss", [curve.Line("loss", [float(s) for s in range(20000)], values)])
  assert len(points(svg, 0)) == curve.POINTS and len(svg) < 12000


@pytest.mark.parametrize("rows", [[], [{"step": 3, "loss": 1.0}], [{"step": 3}], [{"step": 0, "loss": 0.0}],
                                  [{"step": 1, "loss": -1.0}, {"step": 2, "loss": -1.0}]])
def test_short_and_flat_runs_make_a_page(rows, tmp_path):
  text = page.render(page.Report("short", measures=rows), tmp_path)
  assert "nan" not in text.split("</style>")[1] and "inf" not in text.split("</style>")[1]


HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(1)> \" onmouseover=alert(1) ' & 猫 \u202e"


class Parsed(HTMLParser):
  """Elements and text as a browser would see them."""

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.elements, self.text = [], []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))

  def handle_data(self, data):
    self.text.append(data)


def hostile_report(folder):
  folder = folder / "a b#c?%41\"><script>"
  folder.mkdir()
  files = [folder / name for name in ("s.png", "f.mp4", "g.gif")]
  rows = [{"step": s, "loss": 1.0 / s, f"held_out/{HOSTILE}": 2.0 / s} for s in range(1, 50)]
  return files, page.Report(HOSTILE, {HOSTILE: HOSTILE}, rows, [page.Score(HOSTILE, 3, 20.0, {HOSTILE: 18.0})],
                            [page.Exhibit(HOSTILE, HOSTILE, *files, note=HOSTILE)])


def test_a_hostile_caption_stays_text(tmp_path):
  files, report = hostile_report(tmp_path)
  page.write_page(tmp_path / "report.html", report)
  parsed = Parsed((tmp_path / "report.html").read_text())
  tags = [tag for tag, _ in parsed.elements]
  assert "script" not in tags and tags.count("img") == 1 and tags.count("video") == 1
  assert not any(name.startswith("on") or name == "style" for _, attributes in parsed.elements for name in attributes)
  # title element, heading, fact twice, chart label, table twice, task, caption, note
  assert sum(text.replace("_", " ").strip() == HOSTILE.replace("_", " ") for text in parsed.text) == 10
  links = {unquote(attributes[name]) for _, attributes in parsed.elements for name in ("href", "src")
           if name in attributes}
  assert links == {os.path.relpath(file, tmp_path) for file in files}


def test_the_policy_allows_its_own_style_and_no_script(tmp_path):
  text = page.render(page.Report("a"), tmp_path)
  policy = next(attributes["content"] for tag, attributes in Parsed(text).elements
                if attributes.get("http-equiv") == "Content-Security-Policy")
  style = re.search("<style>(.*)</style>", text, re.DOTALL)[1]
  assert f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'" in policy
  assert policy.startswith("default-src 'none'") and "script-src" not in policy and "unsafe" not in policy
  assert not re.search(r"https?://", text), "the page asks no server for anything"


def test_the_table_shows_means_and_the_gain_over_the_best_baseline(tmp_path):
  scores = [page.Score("first_last", 32, 27.3, {"repeat_first": 18.25, "cross_fade": 24.0}),
            page.Score("first", 32, 17.0, {"repeat_first": 18.25}), page.Score("none", 8, float("inf"), {})]
  cells = re.findall(r"<td[^>]*>(.*?)</td>", page.table(scores))
  assert cells == ["first last", "32", "27.30", "18.25", "24.00", "+3.30",
                   "first", "32", "17.00", "18.25", "–", "-1.25", "none", "8", "∞", "–", "–", "–"]


def test_the_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  page.write_page(tmp_path / "r.html", page.Report("before"))
  assert os.listdir(tmp_path) == ["r.html"]

  def full(self, text, encoding):
    self.open("w").write(text[:9])
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("pathlib.Path.write_text", full)
  with pytest.raises(BadInput, match="No space left on device"):
    page.write_page(tmp_path / "r.html", page.Report("after"))
  assert os.listdir(tmp_path) == ["r.html"] and "before" in (tmp_path / "r.html").read_text()
