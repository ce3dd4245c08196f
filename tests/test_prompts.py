"""Prompt files, positions, sizes and caption endings are AniSora's, and every wrong line says what is wrong with it."""

import hashlib
import math
import re
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from anisora_jax.errors import BadInput
from anisora_jax.sampling import prompts

WORDS = st.text(st.characters(blacklist_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=9)
PROMPTS = st.lists(st.one_of(WORDS, st.sampled_from(["&&", "0,1", "&", ","])), max_size=6).map(" ".join)
NAMES = st.text(st.characters(whitelist_categories=["L", "Nd"], whitelist_characters="/._-"), min_size=1, max_size=9)


@st.composite
def lines(draw):
  images = tuple(draw(st.lists(NAMES, max_size=4)))
  places = draw(st.lists(st.floats(0, 1), min_size=len(images), max_size=len(images), unique=True))
  prompt = draw(PROMPTS.filter(lambda text: "@@" not in text and not text.startswith("#") and (text or images)))
  return prompt, images, tuple(places), draw(st.integers(1, 99))


def write(line):
  """A line as AniSora's reader splits it: first at @@, then the right part at &&, then both at commas."""
  if not line.images:
    return line.prompt
  return f"{line.prompt}@@{','.join(line.images)}&&{','.join(map(repr, line.positions))}"


def spoken(wrong, *args, **kwargs):
  """The message of the refusal, which must be one line."""
  with pytest.raises(BadInput) as refusal:
    wrong(*args, **kwargs)
  assert "\n" not in str(refusal.value)
  return str(refusal.value)


@given(lines())
def test_a_written_line_reads_back(parts):
  line = prompts.Line(*parts)
  assert prompts.parse_line(write(line), line.number) == line


def test_a_file_holds_films_between_blank_lines_and_comments(tmp_path, monkeypatch):
  (tmp_path / "stills").mkdir()
  for name in ("a.png", "stills/b.png", "only_here.png"):
    (tmp_path / name).touch()
  (tmp_path / "films").mkdir()
  (tmp_path / "films" / "a.png").touch()
  text = ("\ufeff# two films\r\n\r\n  She runs, R&B plays && stops. @@a.png, ../stills/b.png && 1, 0.5\r\n"
          "狐が走る\u2028@@only_here.png\nno picture, at all && 0.5\n@@a.png")
  (tmp_path / "films" / "list.txt").write_bytes(text.encode())
  monkeypatch.chdir(tmp_path)
  near = str(tmp_path / "films" / "a.png")
  assert prompts.read_prompts(tmp_path / "films" / "list.txt") == [
    prompts.Line("She runs, R&B plays && stops.", (near, str(tmp_path / "films" / "../stills/b.png")), (1.0, 0.5), 3),
    prompts.Line("狐が走る", ("only_here.png",), (0.0,), 4),
    prompts.Line("no picture, at all && 0.5", (), (), 5),
    prompts.Line("", (near,), (0.0,), 6),
  ]


def test_anisoras_own_lines_are_read():
  line = prompts.parse_line('A "Wind of the Valley," tale. motion score: 1.3. There is no text in the video. '
                            "@@data/imgs/fu_mo_1.png,data/imgs/fu_mo_1_num2.png,data/imgs/fu_mo_1_num3.png&&0,0.5,1")
  assert line.prompt.endswith("no text in the video.") and line.images[1] == "data/imgs/fu_mo_1_num2.png"
  assert list(prompts.keyframes(line, 81).items()) == list(zip((0, 40, 80), line.images, strict=True))
  assert prompts.keyframes(prompts.parse_line("a@@b.png,c.png&&1,0"), 81) == {80: "b.png", 0: "c.png"}


@pytest.mark.parametrize(("line", "said"), [
  ("a@@p.png&&half", "position 'half' is not a number: take 0"),
  ("a@@p.png&&0&&1", "position '0&&1' is not a number"),
  ("a@@p.png&&", "position '' is not a number"),
  ("a@@p.png&&0,", "position '' is not a number"),
  ("a@@p.png,q.png&&0", "2 images and 1 positions"),
  ("a@@p.png,q.png", "2 images and 1 positions, none written being one at 0: give each image its position"),
  ("a@@p.png&&0,1", "1 images and 2 positions"),
  ("a@@p.png&&1.5", "position 1.5 is outside the film: take 0 (first frame) .. 1 (last frame)"),
  ("a@@p.png&&-0.1", "position -0.1 is outside the film"),
  ("a@@p.png&&nan", "position nan is outside the film"),
  ("a@@p.png,q.png&&0.5,.50", "position 0.5 is given to more than one image"),
  ("@@", "neither a prompt nor an image: write PROMPT@@first.png,last.png&&0,1."),
  (" @@ , &&0,1", "neither a prompt nor an image"),
  ("a@@", "the name of an image is empty"),
  ("a@@p.png,,q.png&&0,0.5,1", "the name of an image is empty"),
  ("a@@p.png@@q.png", "@@ stands more than once"),
  ("p.png@@" + "a fox runs" * 99 + "&&0", "neither in the prompt file's folder nor at that path from here"),
  ("a@@gone.png", "image gone.png is neither in the prompt file's folder nor at that path from here"),
  ("a@@.", "image . is neither in"),
])
def test_a_wrong_line_is_refused_with_its_file_and_number(tmp_path, monkeypatch, line, said):
  monkeypatch.chdir(tmp_path)
  for name in ("p.png", "q.png"):
    (tmp_path / name).touch()
  (tmp_path / "list.txt").write_text(f"# first\nfine@@p.png\n{line}\n", "utf-8")
  message = spoken(prompts.read_prompts, "list.txt")
  assert message.startswith("list.txt, line 3: ") and said in message


def test_a_wrong_file_is_refused(tmp_path):
  assert "gone.txt does not exist" in spoken(prompts.read_prompts, tmp_path / "gone.txt")
  assert "or is a folder" in spoken(prompts.read_prompts, tmp_path)
  path = tmp_path / "list.txt"
  path.write_bytes("fine\n\n狐が走る".encode("gbk"))
  assert spoken(prompts.read_prompts, path).startswith(f"{path}, line 3: not UTF-8: save the file as UTF-8")
  path.write_bytes(b"\xef\xbb\xbf# nothing\r\n \r\n")
  assert spoken(prompts.read_prompts, path).startswith(f"prompt file {path} has no lines: write one a film, as in")


@pytest.mark.parametrize(("position", "frame"), [(0.0, 0), (0.25, 16), (0.5, 40), (0.75, 64), (1.0, 80), (0.149, 8)])
def test_positions_fall_on_the_frames_of_anisora(position, frame):
  assert prompts.keyframe(position, 81) == frame


@given(st.floats(0, 1), st.integers(0, 40))
def test_a_keyframe_is_the_nearest_eighth_frame_of_the_film(position, groups):
  """Counted in whole frames and without rounding: a tie may go either way, but only to an even multiple."""
  frame, reached = prompts.keyframe(position, 8 * groups + 1), int(8 * groups * position)
  assert frame in range(0, 8 * groups + 1, 8)
  assert abs(frame - reached) < 4 or (abs(frame - reached) == 4 and frame % 16 == 0)


@pytest.mark.parametrize(("frames", "near"), [
  (80, (73, 81)), (77, (73, 81)), (82, (81, 89)), (1000, (993, 1001)), (0, (1, 9)),
])
def test_a_film_that_cannot_hold_its_last_keyframe_is_refused(frames, near):
  message = spoken(prompts.keyframe, 0.5, frames)
  assert message.startswith(f"a film of {frames} frames") and message.endswith(f"example {near[0]} or {near[1]}.")


def test_keyframes_outside_the_film_or_on_top_of_each_other_are_refused():
  assert "position 2 is outside the film" in spoken(prompts.keyframe, 2.0, 81)
  line = prompts.Line("a", ("p.png", "q.png"), (0.5, 0.52), 7)
  assert spoken(prompts.keyframes, line, 81).startswith("line 7: p.png and q.png both fall on frame 40 of 81")
  assert prompts.keyframes(line, 401) == {200: "p.png", 208: "q.png"}


@pytest.mark.parametrize(("rule", "cell", "image", "area", "size"), [
  ("i2v", 16, (360, 640), 640 * 360, (352, 640)),
  ("i2v", 16, (360, 640), 720 * 1280, (720, 1280)),
  ("i2v", 16, (640, 360), 720 * 1280, (1280, 720)),
  ("i2v", 16, (480, 832), 720 * 1280, (720, 1248)),
  ("i2v", 16, (1080, 1920), 480 * 832, (464, 832)),
  ("i2v", 16, (480, 832), 480 * 832, (480, 832)),      # upstream: 464, by one unit in the last place of a float
  ("i2v", 16, (1024, 1024), 480 * 832, (624, 624)),
  ("i2v", 32, (360, 640), 704 * 1280, (704, 1248)),
  ("ti2v", 32, (704, 1280), 704 * 1280, (704, 1280)),  # these by Wan2.2's own best_output_size
  ("ti2v", 32, (360, 640), 704 * 1280, (704, 1248)),
  ("ti2v", 32, (1024, 1024), 704 * 1280, (928, 960)),
  ("ti2v", 32, (300, 1000), 704 * 1280, (512, 1728)),
  ("ti2v", 32, (300, 1000), 480 * 832, (320, 1152)),
  ("ti2v", 32, (1280, 704), 480 * 832, (832, 480)),
])
def test_sizes_are_those_of_the_native_repositories(rule, cell, image, area, size):
  assert prompts.size_of(*image, area, cell, rule) == size


@given(st.integers(64, 4096), st.integers(64, 4096), st.integers(2 ** 14, 2 ** 21), st.sampled_from([4, 16, 32]))
def test_sizes_are_whole_cells_within_the_area(height, width, area, cell):
  assume(16 * min(height, width) >= max(height, width) and area >= (16 * cell) ** 2)
  lat = [math.floor(math.sqrt(Fraction(area * a, b)) / (cell // 2) + 1e-9) // 2 * 2 for a, b in
         ((height, width), (width, height))]  # the formula of the repositories, nudged over its float error
  floors = prompts.size_of(height, width, area, cell)
  assert floors == tuple(n * (cell // 2) for n in lat)
  best = prompts.size_of(height, width, area, cell, "ti2v")

  def stretch(size):
    return abs(math.log(size[1] * height / (size[0] * width)))

  assert all(side % cell == 0 for side in best) and best[0] * best[1] <= area
  assert best[0] == floors[0] or best[1] == floors[1]
  other = (area // floors[1] // cell * cell, floors[1]), (floors[0], area // floors[0] // cell * cell)
  assert stretch(best) <= min(map(stretch, other)) + 1e-9


def test_sizes_that_cannot_be_are_refused():
  assert "image of 99999 x 10 makes no film of 399360 pixels" in spoken(prompts.size_of, 10, 99999, 480 * 832, 16)
  assert "makes no film of -5 pixels with sides of at least 16" in spoken(prompts.size_of, 480, 832, -5, 16)
  assert "image of 832 x 0" in spoken(prompts.size_of, 0, 832, 480 * 832, 16)
  assert "no rule of sizes is named 't2iv'" in spoken(prompts.size_of, 480, 832, 480 * 832, 16, "t2iv")


def test_captions_end_in_anisoras_words():
  assert prompts.suffix(5.5, 3.0, no_text=True) == (  # anisoraV3.2/data/inference_any.txt
    "aesthetic score: 5.5. motion score: 3.0. There is no text in the video.")
  assert prompts.suffix(aesthetic=5.5, motion=1.3) == "aesthetic score: 5.5. motion score: 1.3."  # V1's prompt_demo.txt
  assert prompts.suffix(5.0, 0.7, "tilt up", True) == (
    "aesthetic score: 5.0. motion score: 0.7. camera motion: tilt up. There is no text in the video.")
  assert prompts.suffix() == ""


@given(*[st.none() | st.integers(0, 100).map(lambda n: n / 10)] * 2, st.none() | st.sampled_from(["tilt up", "pan"]),
       st.booleans())
def test_what_is_written_at_the_end_can_be_read_off(aesthetic, motion, camera, no_text):
  text = prompts.suffix(aesthetic, motion, camera, no_text)
  read = dict(re.findall(r"(\w+) (?:score|motion): ([\d.]+|[a-z ]+)\.", text))
  assert read.pop("camera", None) == camera
  assert {name: float(number) for name, number in read.items()} == {
    name: number for name, number in (("aesthetic", aesthetic), ("motion", motion)) if number is not None}
  assert text.endswith("There is no text in the video.") == no_text


@pytest.mark.parametrize(("wrong", "said"), [
  ({"aesthetic": -1.0}, "aesthetic score -1 is outside 0 .. 10: take 5.0 to 7.0."),
  ({"aesthetic": 55.0}, "aesthetic score 55 is outside"),
  ({"aesthetic": math.nan}, "aesthetic score nan is outside"),
  ({"motion": -0.5}, "motion score -0.5 is not a number from 0: take 2.0 to 4.0"),
  ({"motion": math.inf}, "motion score inf is not a number from 0"),
  ({"camera": "tilt\nup"}, "camera motion 'tilt\\nup' is not one phrase: give a few words without a full stop"),
  ({"camera": " "}, "camera motion ' ' is not one phrase"),
  ({"camera": "tilt up. Then pan"}, "is not one phrase"),
  ({"camera": "pan@@x.png"}, "is not one phrase"),
])
def test_nonsense_at_the_end_of_a_caption_is_refused(wrong, said):
  assert said in spoken(prompts.suffix, **wrong)


def test_negative_prompts_are_the_published_ones():
  """The digest is of the text that was compared with Wan's shared_config.py; the file is not among our packages."""
  assert hashlib.sha256(prompts.NEGATIVES["wan"].encode()).hexdigest() == (
    "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e")
  assert prompts.NEGATIVES["wan21_i2v"] == "镜头晃动，" + prompts.NEGATIVE
  assert prompts.NEGATIVES["wan21_flf2v"] == "镜头切换，" + prompts.NEGATIVES["wan21_i2v"]
