"""A user's own model, run as a command, is asked about a shot; its scores are kept, and nothing else it does."""

import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from curation import child, measure, probe, provider
from curation.items import Film, Shot

from anisora_jax.errors import BadInput
from anisora_jax.loaders import video

HEIGHT, WIDTH = 64, 96


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
  """60 frames, each of one grey."""
  return np.broadcast_to(np.arange(20, 200, 3, dtype=np.uint8)[:, None, None, None], (60, HEIGHT, WIDTH, 3)).copy()


def film_of(folder: Path, pictures: np.ndarray, name: str = "film.mp4") -> tuple[Film, Shot]:
  (folder / name).write_bytes(video.encode(pictures, 24.))
  film = probe.probe(folder / name, name, probe.Settings())
  return film, Shot(name, 0, len(pictures), (0, 0, HEIGHT, WIDTH))


@pytest.fixture(scope="module")
def shot(tmp_path_factory, pictures) -> tuple[Film, Shot]:
  return film_of(tmp_path_factory.mktemp("grey"), pictures)


def measured(shot: tuple[Film, Shot], *providers) -> dict:
  found = measure.measure(*shot, measure.Settings(text_detector="none", providers=providers))
  return {name: found[name] for name in ("aesthetic", "tags") if name in found}


def asking(code: str, **how) -> measure.Command:
  how = {"scores": {"aesthetic": (0, 10)}, "words": ("tags",), "seconds": 20, **how}
  return measure.Command("taste", (sys.executable, "-c", f"import json, os, sys, time\n{code}"), **how)


def answer(shot, code: str, **how) -> dict:
  return measured(shot, asking(code, **how))


SEES = """
told = json.load(sys.stdin)
import cv2
pictures = [cv2.imread(frame["path"]) for frame in told["frames"]]
print("loading ...", file=sys.stderr)
tags = [told["id"], str([frame["frame"] for frame in told["frames"]]), str(round(float(pictures[1].mean()), 1))]
print(json.dumps({"aesthetic": pictures[0].shape[0] / 100, "tags": tags}))
"""


def test_a_command_sees_frames_of_the_shot_and_its_scores_are_kept(shot, pictures):
  found = answer(shot, SEES)
  assert found["aesthetic"] == HEIGHT / 100
  assert found["tags"][:2] == ["film.mp4/000000", "[10, 30, 50]"]
  assert float(found["tags"][2]) == pytest.approx(pictures[30].mean(), abs=1.5)


@pytest.mark.parametrize(("reply", "found"), [
  ({}, {}), ({"aesthetic": None}, {}), ({"tags": []}, {"tags": []}), ({"aesthetic": 7}, {"aesthetic": 7.}),
  ({"aesthetic": 0.0, "tags": ["rain", "夜"]}, {"aesthetic": 0., "tags": ["rain", "夜"]})])
def test_a_score_that_is_not_given_is_absent(shot, reply, found):
  assert answer(shot, f"print({json.dumps(reply)!r})") == found


@pytest.mark.parametrize(("code", "why"), [
  ("print('{\"aesthetic\": NaN}')", "does not answer in JSON .NaN is no number."),
  ("print('{\"aesthetic\": -Infinity}')", "-Infinity is no number"),
  ("print('{\"aesthetic\": 1e999}')", "'aesthetic' as inf .*allowed are numbers from 0 to 10"),
  ("print('{\"aesthetic\": 10.01}')", "allowed are numbers from 0 to 10"),
  ("print('{\"aesthetic\": true}')", "allowed are numbers from 0 to 10"),
  ("print('{\"aesthetic\": \"5.1\"}')", "allowed are numbers from 0 to 10"),
  ("print('{\"tags\": \"rain\"}')", "allowed is a list of at most 200 words"),
  ("print(json.dumps({'tags': ['a' * 101]}))", "at most 100 letters"),
  ("print(json.dumps({'tags': ['<b>\\n']}))", "allowed is a list"),
  ("print(json.dumps({'tags': ['x'] * 201}))", "allowed is a list"),
  ("print('{\"motion\": 3}')", "'motion' as 3 .*did not say that it would"),
  ("print('{\"aesthetics\": 3}')", "did you mean 'aesthetic'"),
  ("print('[5]')", "answers with a list"),
  ("print('score: 5')", "does not answer in JSON"),
  ("pass", "does not answer in JSON"),
  ("print('[' * 100000)", "does not answer in JSON"),
  ("os.write(1, b'\\xff\\xfe{}')", "does not answer in JSON"),
  ("os.write(2, b'weights are missing\\n\\x1b[0m'); sys.exit(3)", r"ended with status 3: .*\[0m"),
  ("os.kill(os.getpid(), 9)", "ended with status -9: it said nothing"),
  ("while True: os.write(1, b'5' * 65536)", "answers with more than 1048576 bytes")])
def test_what_is_no_answer_is_refused_in_one_line_that_names_the_provider(shot, code, why):
  with pytest.raises(provider.Failed, match=why) as failure:
    answer(shot, code)
  assert str(failure.value).isprintable() and "'taste'" in str(failure.value)
  assert len(str(failure.value)) < 500


@pytest.mark.parametrize("code", ["time.sleep(60)", "os.close(1); os.close(2); time.sleep(60)",
                                  "print('{}'); sys.stdout.flush(); os.fork(); time.sleep(60)"])
def test_a_provider_that_hangs_is_ended_with_all_it_started(shot, tmp_path, code):
  start = time.monotonic()
  with pytest.raises(provider.Failed, match="'taste' did not answer within 4 s"):
    answer(shot, f"open({str(tmp_path / 'group')!r}, 'w').write(str(os.getpgid(0)))\n{code}", seconds=4)
  assert time.monotonic() - start < 30
  with pytest.raises(ProcessLookupError):
    for _ in range(100):  # the killed are gone when their parents have heard of it
      os.killpg(int((tmp_path / "group").read_text()), 0)
      time.sleep(.05)


def test_names_of_films_and_words_of_commands_reach_no_shell(pictures, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  name = "-$(touch hacked) ; \"'\n<b>.mp4"
  tells = "import json, sys; print(json.dumps({'tags': [json.dumps(json.load(sys.stdin)['film']), *sys.argv[1:]]}))"
  words = (sys.executable, "-c", tells, "$(touch hacked)", "; touch hacked")
  found = measured(film_of(tmp_path, pictures[:8], name), {"name": "taste", "command": words, "words": ["tags"]})
  assert found["tags"] == [json.dumps(name), *words[3:]]
  assert not list(tmp_path.rglob("*hacked"))


def test_a_model_may_take_the_addresses_that_films_may_not():
  held = child.Child(child.Limits(60., 4.))
  tells = "from resource import *; print('{\"limit\": %d}' % getrlimit(RLIMIT_AS)[0])"
  assert held.call(resource.getrlimit, resource.RLIMIT_AS)[0] == 4 * 2**30
  found = held.call(provider.ask, "taste", (sys.executable, "-c", tells), {}, 60.)
  held.close()
  assert found["limit"] == resource.getrlimit(resource.RLIMIT_AS)[1]


@pytest.mark.parametrize(("made", "why"), [
  (lambda: measure.Settings(height=8), "measure.height is 8: allowed are 32 to 4320"),
  (lambda: measure.Settings(text_detector="easyocr"), "no text detector is named 'easyocr'"),
  (lambda: measure.Settings(providers=({"name": "a", "command": "a.py", "words": ["tags"]},)), "give a list of words"),
  (lambda: measure.Settings(providers=({"name": "a", "command": []},)), "give a list of words"),
  (lambda: measure.Settings(providers=({"name": "a", "command": ["x"]},)), "gives nothing"),
  (lambda: measure.Settings(providers=({"name": "a", "comand": ["x"]},)), "no field 'comand': did you mean 'command'"),
  (lambda: measure.Settings(providers=({"command": ["x"]},)), "lacks its 'name'"),
  (lambda: measure.Settings(providers=({"kind": "http", "name": "a"},)), "no kind of provider is named 'http'"),
  (lambda: asking("", scores={"aesthetic": (10, 0)}), "bounds .10, 0. for 'aesthetic'"),
  (lambda: asking("", scores={"sharpness": (0, 1)}), "'sharpness', which is measured here"),
  (lambda: asking("", frames=0), "frames 0: allowed are 1 to 64"),
  (lambda: measure.Settings(providers=(asking(""), asking(""))), "more than one provider gives 'aesthetic'")])
def test_settings_that_mean_nothing_are_refused(made, why):
  with pytest.raises(BadInput, match=why) as mistake:
    made()
  assert "\n" not in str(mistake.value)


def test_a_command_that_is_not_there_is_told(shot):
  with pytest.raises(provider.Failed, match=r"provider 'a' does not start .*give the words of one that runs"):
    measured(shot, {"name": "a", "command": ["/no/such"], "words": ["tags"]})
