"""Captions come from whom they say they come from, are never made up, and reach nothing but a record."""

import base64
import json
import os
import sys
import threading
import time
import unicodedata
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest
import toons
from curation import chat, describe
from curation.items import Candidate, Film, Shot
from hypothesis import given, settings
from hypothesis import strategies as st

from anisora_jax.errors import BadInput
from anisora_jax.loaders import video
from anisora_jax.sampling import prompts

FPS, HEIGHT, WIDTH = 12., 48, 72
MEASURES = {"aesthetic": 5.62, "motion_per_second": .21, "camera": "pan left", "text_area": 0.}


class Server:
  """An endpoint that keeps what it is sent and answers from a list: (status, body), or a function of the request."""

  def __init__(self, answers):
    self.seen, self.headers, answers = [], [], iter(answers)
    seen, headers = self.seen, self.headers

    class Handler(BaseHTTPRequestHandler):
      def do_POST(self):
        seen.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        headers.append(dict(self.headers))
        answer = next(answers)
        if callable(answer):
          answer(self)
          return
        status, body = answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

      def log_message(self, *_):
        pass

    self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.server.daemon_threads = True
    self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
    threading.Thread(target=self.server.serve_forever, daemon=True).start()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.server.shutdown()
    self.server.server_close()


def _says(text: str) -> tuple[int, bytes]:
  return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@pytest.fixture(scope="module")
def film(tmp_path_factory):
  """A drawn film of 3 s that stands still for 1 s, walks for 1 s and stands still again."""
  shot = toons.plan_shot(np.random.default_rng(3), "on a sunny day", 3, 100 * WIDTH / HEIGHT)
  moments = np.clip(np.arange(36) - 12, 0, 12) * 2 / FPS
  frames = np.stack([toons.draw_frame(shot, moment, HEIGHT, WIDTH)[0] for moment in moments])
  path = tmp_path_factory.mktemp("films") / "a film.mp4"
  path.write_bytes(video.encode(frames, FPS))
  return Film("a film.mp4", str(path), "sha", path.stat().st_size, "h264", HEIGHT, WIDTH, FPS, 36)


@pytest.fixture(scope="module")
def clip(film):
  return Candidate(Shot(film.name, 6, 30, (4, 8, 40, 60)), FPS, MEASURES, ())


def _settings(server=None, **fields) -> describe.Settings:
  named = {"url": server.url, "model": "seer", "providers": ("endpoint",)} if server else {}
  return describe.Settings(**{"seconds": 30., "pause": 0., "suffixes": (), "change": .02} | named | fields)


def _images(message: dict) -> list[np.ndarray]:
  parts = message["content"]
  if isinstance(parts, str):
    return []
  kept = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
  assert all(url.startswith("data:image/png;base64,") for url in kept)
  return [cv2.imdecode(np.frombuffer(base64.b64decode(url.partition(",")[2], validate=True), np.uint8), 1)
          for url in kept]


def _text(message: dict) -> str:
  parts = message["content"]
  return parts if isinstance(parts, str) else " ".join(part["text"] for part in parts if part["type"] == "text")


def test_the_endpoint_is_asked_key_frame_by_key_frame_and_then_to_merge(film, clip):
  notes = [f"note {n} {{braces}}" for n in range(7)]
  with Server([_says(note) for note in notes] + [_says("The cat <b>walks</b>.\nIt stops.")]) as server:
    settings = _settings(server, pictures=4, side=32)
    shown = describe.shown(film, clip.shot, settings)
    count = len(shown)
    assert 3 <= count <= 4
    server_notes = notes[:count]
    told = describe.describe(film, clip, settings)
  asked = [body for _, body in server.seen]
  assert {path for path, _ in server.seen} == {"/v1/chat/completions"} and len(asked) == count + 1
  assert told.text == notes[count] and told.by == "endpoint" and told.reason == ""
  for body in asked:
    assert body["model"] == "seer" and body["temperature"] == 0 and body["max_tokens"] == 400
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
  users = [body["messages"][1] for body in asked]
  assert [len(_images(user)) for user in users] == [1] + [2] * (count - 1) + [0]
  pictures = [cv2.imdecode(np.frombuffer(png, np.uint8), 1) for _, png in shown]
  for number in range(1, count):  # a window of two that slides by one, and the words on the step before alone
    np.testing.assert_array_equal(_images(users[number]), pictures[number - 1:number + 1])
    assert server_notes[number - 1] in _text(users[number])
    assert not any(note in _text(users[number]) for note in server_notes[:number - 1])
    assert f"{shown[number][0]:.1f} s" in _text(users[number])
  assert all(note in _text(users[-1]) for note in server_notes)
  at = [_text(users[-1]).index(note) for note in server_notes]
  assert at == sorted(at)
  assert max(picture.shape[0] for picture in pictures) <= 32 and pictures[0].shape[1] == 32


def test_the_last_answer_is_the_caption_cleaned(film, clip):
  still = Candidate(Shot(film.name, 0, 11, (0, 0, HEIGHT, WIDTH)), FPS, {}, ())
  with Server([_says("A <script>alert(1)</script>\x00\x1b[31m cat‮.\r\n It stops.")]) as server:
    told = describe.describe(film, still, _settings(server))
  assert len(server.seen) == 1  # what stands still is one picture, and one note needs no merging
  assert told.text == "A script alert(1) /script [31m cat. It stops."


def _slow(handler):
  time.sleep(1.5)


def _drips(handler):
  handler.send_response(200)
  handler.end_headers()
  for _ in range(30):
    try:
      handler.wfile.write(b" ")
      handler.wfile.flush()
    except OSError:
      return
    time.sleep(.1)


def _floods(handler):
  handler.send_response(200)
  handler.end_headers()
  try:
    for _ in range(40):
      handler.wfile.write(b" " * 2**16)
  except OSError:
    return


def _hangs_up(handler):
  handler.connection.close()


def _elsewhere(handler):
  handler.send_response(302)
  handler.send_header("Location", "http://127.0.0.1:1/v1/chat/completions")
  handler.end_headers()


@pytest.mark.parametrize(("answers", "tries", "reason", "calls"), [
  ([(500, b"out of memory")] * 3, 3, "endpoint_status", 3),
  ([(429, b"")] * 2, 2, "endpoint_status", 2),
  ([(400, b"no such model")], 3, "endpoint_status", 1),       # asking again would not help
  ([_slow] * 2, 2, "endpoint_timeout", 2),
  ([_drips], 1, "endpoint_timeout", 1),                       # a byte now and then keeps no one waiting
  ([_floods], 3, "endpoint_junk", 1),
  ([_hangs_up] * 2, 2, "endpoint_unreachable", 2),
  ([_elsewhere], 3, "endpoint_status", 1),                    # the key does not go where a server points
  ([(200, b"<html>busy</html>")], 3, "endpoint_junk", 1),
  ([(200, b'{"choices": []}')], 3, "endpoint_junk", 1),
  ([(200, b'{"choices": [{"message": {"content": null}}]}')], 3, "endpoint_junk", 1),
  ([(200, b'{"choices": [{"message": {"content": ["x"]}}]}')], 3, "endpoint_junk", 1),
  ([_says("  \n ")], 3, "endpoint_junk", 1),
  ([(200, b"[" * 100000)], 3, "endpoint_junk", 1),
  ([_says("\u200b\u202e")], 3, "endpoint_empty", 1),
], ids=lambda value: getattr(value, "__name__", None))
def test_a_failing_endpoint_leaves_no_caption_and_a_reason(answers, tries, reason, calls, film):
  still = Candidate(Shot(film.name, 0, 11, (0, 0, HEIGHT, WIDTH)), FPS, MEASURES, ())
  with Server(answers) as server:
    seconds = .6 if reason == "endpoint_timeout" else 30.
    told = describe.describe(film, still, _settings(server, tries=tries, seconds=seconds, suffixes=("motion",)))
  assert (told.text, told.by, told.reason) == ("", "", reason)
  assert len(server.seen) == calls
  assert told.detail.startswith(reason) and len(told.detail) <= 500


def test_a_failure_on_the_way_is_tried_again_after_longer_and_longer_pauses(film, clip):
  with Server([(503, b""), (500, b""), (429, b""), _says("a cat")]) as server:
    pauses = []
    endpoint = chat.Endpoint(server.url, "seer", pause=.5, tries=4)
    assert chat.ask(endpoint, "what?", sleep=pauses.append) == "a cat"
  assert pauses == [.5, 1., 2.]
  assert [body for _, body in server.seen] == [server.seen[0][1]] * 4  # the same question each time


def test_nobody_at_the_address_is_a_reason_and_the_next_provider_is_named(film, clip):
  told = describe.describe(film, clip, describe.Settings(
    providers=("endpoint", "template"), url="http://127.0.0.1:9/v1", model="seer", tries=1, suffixes=()))
  assert told.by == "template" and told.reason == "" and told.detail.startswith("endpoint_unreachable")
  alone = describe.describe(film, clip, describe.Settings(
    providers=("endpoint",), url="http://127.0.0.1:9/v1", model="seer", tries=1))
  assert (alone.text, alone.reason) == ("", "endpoint_unreachable")


def test_the_key_goes_into_the_header_and_nowhere_else(film, clip, monkeypatch):
  monkeypatch.setenv("CAPTION_KEY", "sk-secret")
  with Server([(401, b"key sk-secret is wrong")]) as server:
    settings = _settings(server, key_variable="CAPTION_KEY")
    told = describe.describe(film, clip, settings)
  assert server.headers[0]["Authorization"] == "Bearer sk-secret"
  assert "sk-secret" not in repr((told, settings)) and "***" in told.detail
  assert "sk-secret" not in json.dumps(server.seen)
  for value in ("", "two\nlines"):
    monkeypatch.setenv("CAPTION_KEY", value)
    with pytest.raises(BadInput, match="CAPTION_KEY holds no key") as refused:
      describe.describe(film, clip, settings)
    assert "two" not in str(refused.value)


def test_key_frames_stand_where_the_change_is(film):
  assert describe.key_frames(np.zeros(50), 8, .05) == [0]
  assert describe.key_frames(np.full(400, .001), 8, .05) == [0]  # an encoder's noise is no change
  assert describe.key_frames(np.full(40, .05), 5, .05) == [0, 10, 20, 30, 40]
  burst = np.zeros(60)
  burst[20:30] = .02
  chosen = describe.key_frames(burst, 5, .02)
  assert chosen[0] == 0 and chosen[-1] == 30 and all(20 <= frame <= 30 for frame in chosen[1:])
  assert describe.key_frames(np.zeros(0), 8, .05) == [0]
  seconds = [s for s, _ in describe.shown(film, Shot(film.name, 0, 36, (0, 0, HEIGHT, WIDTH)), _settings())]
  assert seconds[0] == 0 and len(seconds) >= 3 and all(.9 <= s <= 2.1 for s in seconds[1:])


def _program(tmp_path, body: str) -> tuple[str, ...]:
  path = tmp_path / "captioner.py"
  path.write_text(f"import json, os, sys, time\nasked = json.load(sys.stdin)\n{body}\n")
  return sys.executable, str(path)


def test_a_program_is_shown_pictures_and_its_answer_is_the_caption(film, clip, tmp_path):
  command = _program(tmp_path, "sizes = [os.path.getsize(p['path']) > 0 for p in asked['pictures']]\n"
                     "print(json.dumps({'caption': f\"{asked['id']} {asked['measures']['camera']} {sum(sizes)} "
                     "{asked['pictures'][-1]['path']}\"}))")
  told = describe.describe(film, clip, _settings(providers=("command",), command=(*command, "$(touch /tmp/x); `x`")))
  words = told.text.rsplit(" ", 2)
  assert told.by == "command" and told.text.startswith(f"{clip.shot.id} pan left ") and int(words[1]) >= 3
  assert not os.path.exists(words[2])  # nothing is left behind


@pytest.mark.parametrize(("body", "reason"), [
  ("sys.exit(3)", "command_failed"), ("print('no json')", "command_failed"), ("print('[1]')", "command_failed"),
  ("print('{\"caption\": 3}')", "command_junk"), ("print('{}')", "command_junk"), ("time.sleep(9)", "command_failed"),
  ("print('{\"caption\": \" \"}')", "command_empty")])
def test_a_failing_program_leaves_no_caption_and_a_reason(body, reason, film, clip, tmp_path):
  seconds = 1. if "sleep" in body else 30.
  told = describe.describe(film, clip, _settings(providers=("command",), command=_program(tmp_path, body),
                                                 seconds=seconds))
  assert (told.text, told.reason) == ("", reason) and told.detail


def test_a_program_that_is_not_there_stops_the_run(film, clip):
  with pytest.raises(BadInput, match="is no program here"):
    describe.describe(film, clip, _settings(providers=("command",), command=("/nowhere/captioner",)))


def test_files_beside_the_film_are_read_as_packing_reads_them(film, clip, tmp_path):
  path = tmp_path / "x.mp4"
  beside = Film("x.mp4", str(path), "", 1, "h264", HEIGHT, WIDTH, FPS, 36)

  def told() -> describe.Caption:
    return describe.describe(beside, clip, _settings(providers=("sidecar",)))

  assert told().reason == "sidecar_absent"
  path.with_suffix(".txt").write_text("A film of a cat.\n")
  assert told().text == "A film of a cat."
  shots = [{"start": 0, "end": 12, "caption": "It sits."}, {"start": 12, "end": 30, "caption": "It walks."}]
  path.with_suffix(".json").write_text(json.dumps({"caption": "Of a dog.", "shots": shots}))
  assert told().text == "It walks."  # frames 6 to 30 have their middle in the second
  path.with_suffix(".json").write_text(json.dumps({"caption": "Of a dog."}))
  assert told().text == "Of a dog."
  for damaged in (b"{", b"[1]", b'{"shots": 3}', b"\xff\xfe", b"[" * 10**5):
    path.with_suffix(".json").write_bytes(damaged)
    assert (told().text, told().reason) == ("", "sidecar_damaged")
  path.with_suffix(".json").unlink()
  path.with_suffix(".txt").unlink()
  os.mkfifo(path.with_suffix(".txt"))
  assert told().reason == "sidecar_absent"


def test_a_template_says_what_was_measured_and_no_more(film, clip):
  def told(**measures) -> str:
    return describe.describe(film, Candidate(clip.shot, FPS, measures, ()), _settings(providers=("template",))).text

  assert told() == "A shot of 2.0 seconds."
  assert told(camera="other") == "A shot of 2.0 seconds."
  assert told(camera="tilt up") == "A shot of 2.0 seconds, the camera tilts up."
  assert told(camera="static", tags=["night", "rain"]) == "Night, rain, a shot of 2.0 seconds, the camera stands still."


@pytest.mark.parametrize("asked", [tuple(describe.SUFFIXES), ("motion",), ("no_text", "aesthetic"), ()])
def test_scores_are_written_as_a_prompt_asks_for_them(asked, film, clip):
  told = describe.describe(film, clip, _settings(providers=("template",), suffixes=asked))
  every = {"aesthetic": 5.62, "motion": 2.1, "camera": "pan left", "no_text": True}
  wanted = " ".join(prompts.suffix(**{name: every[name]}) for name in asked)
  assert told.text == f"A shot of 2.0 seconds, the camera pans left. {wanted}".strip()
  if asked == tuple(describe.SUFFIXES):
    assert told.text.endswith(prompts.suffix(**every))


@pytest.mark.parametrize(("measures", "ending"), [
  ({}, ""), ({"camera": "other", "text_area": .02}, ""), ({"aesthetic": None, "motion_per_second": float("nan")}, ""),
  ({"motion_per_second": .05}, " motion score: 0.5."), ({"text_area": .01}, "")])
def test_a_score_that_was_not_measured_is_not_written(measures, ending, film, clip):
  told = describe.describe(film, Candidate(clip.shot, FPS, measures, ()), describe.Settings(providers=("template",)))
  assert told.text == "A shot of 2.0 seconds." + ending


def test_a_score_off_its_scale_is_left_out_and_said(film, clip):
  told = describe.describe(film, Candidate(clip.shot, FPS, {"aesthetic": 87., "motion_per_second": .1}, ()),
                           describe.Settings(providers=("template",)))
  assert told.text.endswith("seconds. motion score: 1.0.") and "87 is outside 0 .. 10" in told.detail


def test_a_caption_that_brings_scores_does_not_say_them_twice(film, clip, tmp_path):
  path = tmp_path / "x.mp4"
  path.with_suffix(".txt").write_text("A cat. Aesthetic score: 9.9. motion score: 9.0. There is no text in the video.")
  beside = Film("x.mp4", str(path), "", 1, "h264", HEIGHT, WIDTH, FPS, 36)
  told = describe.describe(beside, clip, describe.Settings(providers=("sidecar",), suffixes=("aesthetic", "motion")))
  assert told.text == "A cat. There is no text in the video. aesthetic score: 5.6. motion score: 2.1."


@given(text=st.text(max_size=300), longest=st.integers(16, 100))
@settings(max_examples=200, deadline=None)
def test_any_text_becomes_one_plain_line(text, longest):
  line = describe.clean(text, longest)
  assert len(line) <= longest and line == " ".join(line.split()) and not set("<>\n\r\0") & set(line)
  assert not any(unicodedata.category(sign) in ("Cc", "Cs") for sign in line)
  assert describe.clean(line, longest) == line
  line.encode("utf-8")


def test_ordinary_words_of_any_language_pass_unchanged():
  for text in ("A cat's 3 kittens, 50 % asleep & \"happy\".", "彼女は走る。", "می‌خواهم", "👩‍🚀 waves"):
    assert describe.clean(text, 100) == text
  assert describe.clean("one two three four five", 16) == "one two three"
  assert describe.clean("a" * 30, 16) == "a" * 16


@pytest.mark.parametrize(("fields", "said"), [
  ({"providers": ("sidecars",)}, "did you mean 'sidecar'"), ({"providers": "sidecar"}, "give a tuple"),
  ({"suffixes": ("motions",)}, "did you mean 'motion'"), ({"providers": ("command",)}, "program and arguments"),
  ({"providers": ("endpoint",)}, "name it as its server does"), ({"url": "file:///etc/passwd"}, "HOST:PORT"),
  ({"url": "http://user:key@host/v1"}, "HOST:PORT"), ({"longest": 3}, "allowed are 16"), ({"tries": 0}, "1 to 20"),
  ({"seconds": 0}, "allowed are"), ({"pictures": 0}, "allowed are 1")])
def test_wrong_settings_are_refused_in_one_line(fields, said):
  with pytest.raises(BadInput, match=said) as refused:
    describe.Settings(**fields)
  assert "\n" not in str(refused.value)
