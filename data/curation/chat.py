"""A model behind an OpenAI-compatible address (/v1/chat/completions: vLLM, SGLang, llama.cpp ...) that sees pictures.

A clip is told key frame by key frame, as ShareGPT4Video found best: the first is described, then at each next one what
changed since the one before, given what was said last, and at the end one call without pictures makes one caption of
all notes. So no call sees more than two pictures, however long the clip.

From: Chen et al. 2024, arXiv:2406.04325, section 3.1, "differential sliding-window captioning".
"""

import base64
import ipaddress
import itertools
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from urllib.parse import urlsplit

from anisora_jax.errors import BadInput

LONGEST = 2**20   # bytes of an answer that are read
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # statuses after which another try may do better

ROLE = ("You write notes on animation for training a video generator. Say only what is seen: characters, what they do, "
        "where, how the camera moves. No guesses, no opinions, no mention of frames or pictures.")
FIRST = "This is how a clip begins, at {now:.1f} s. Describe it."
NEXT = ("The first picture is the clip at {before:.1f} s, the second at {now:.1f} s. What had happened before: {said}\n"
        "Describe what changed between the two.")
MERGE = ("These are notes on one clip, in order of time:\n{notes}\n"
         "Write one caption of the whole clip: one paragraph, in order, everything once.")


class NoAnswer(Exception):
  """The model gave nothing that can be used. args: reason, detail for people, whether another try may do better."""


@dataclass(frozen=True)
class Endpoint:
  """url: up to /v1. model: as the server names it. key_variable: environment variable that holds the key, "" for none.

  seconds: for one answer. tries: of one call. pause: seconds before the second try, doubled at each further one.
  tokens: of an answer at most.
  """
  url: str = "http://127.0.0.1:8000/v1"
  model: str = ""
  key_variable: str = ""
  seconds: float = 120.
  tries: int = 3
  pause: float = 1.
  tokens: int = 400

  def __post_init__(self):
    parts = urlsplit(self.url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
      raise BadInput("describe.url is no plain http address (a key belongs in the variable that describe.key_variable "
                     "names): write http://HOST:PORT/v1.")
    if not (self.seconds > 0 and self.pause >= 0 and 1 <= self.tries <= 20 and self.tokens >= 1):
      raise BadInput(f"describe asks for {self.tries} tries of {self.seconds:g} s, pauses of {self.pause:g} s and "
                     f"{self.tokens} tokens: tries are 1 to 20, seconds above 0, pauses from 0, tokens from 1.")

  def key(self) -> str:
    """Raises BadInput where the variable is not set or holds what no header may."""
    if not self.key_variable:
      return ""
    key = os.environ.get(self.key_variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
      raise BadInput(f"environment variable {self.key_variable} holds no key: set it, or leave describe.key_variable "
                     "empty for a server that asks for none.")
    return key


class _NoRedirect(urllib.request.HTTPRedirectHandler):
  """Elsewhere, the key would go along."""

  def redirect_request(self, *_):
    return None


def _opener(url: str) -> urllib.request.OpenerDirector:
  host = urlsplit(url).hostname
  try:
    here = ipaddress.ip_address(host).is_loopback
  except ValueError:
    here = host == "localhost"
  # What is on this machine is not asked for through a proxy.
  proxies = [urllib.request.ProxyHandler({})] if here else []
  return urllib.request.build_opener(_NoRedirect(), *proxies)


def picture_part(png: bytes) -> dict:
  return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(png).decode()}}


def ask(endpoint: Endpoint, text: str, pictures: Sequence[bytes] = (), sleep: Callable[[float], None] = time.sleep
        ) -> str:
  """The model's answer to a text and PNG pictures, in this order. Raises NoAnswer, and BadInput without a key."""
  key = endpoint.key()
  content = [{"type": "text", "text": text}, *map(picture_part, pictures)] if pictures else text
  body = json.dumps({"model": endpoint.model, "temperature": 0, "seed": 0, "max_tokens": endpoint.tokens, "messages": [
    {"role": "system", "content": ROLE}, {"role": "user", "content": content}]}).encode()
  headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
  for number in range(endpoint.tries):
    try:
      return _content(_post(endpoint, body, headers))
    except NoAnswer as failure:
      reason, detail, again = failure.args
      if not again or number + 1 == endpoint.tries:
        # Some servers repeat in their errors what they were sent.
        raise NoAnswer(reason, (detail.replace(key, "***") if key else detail)[:300], again) from None
    sleep(endpoint.pause * 2**number)
  raise AssertionError("unreachable: the last try returns or raises")


def _post(endpoint: Endpoint, body: bytes, headers: dict[str, str]) -> bytes:
  """The body of the answer. Raises NoAnswer (reason, detail, whether another try may do better)."""
  request = urllib.request.Request(endpoint.url.rstrip("/") + "/chat/completions", body, headers, method="POST")
  end = time.monotonic() + endpoint.seconds
  answer = b""
  try:
    with _opener(endpoint.url).open(request, timeout=endpoint.seconds) as response:
      while part := response.read1(2**16):
        answer += part
        if len(answer) > LONGEST:
          raise NoAnswer("junk", f"an answer of more than {LONGEST} bytes", False)
        # The timeout of a socket starts anew at every byte.
        if time.monotonic() > end:
          raise TimeoutError
  except urllib.error.HTTPError as error:
    with error:
      said = " ".join(error.read(500).decode("utf-8", "replace").split())
    raise NoAnswer("status", f"{error.code} {said}".strip(), error.code in AGAIN) from None
  except (urllib.error.URLError, TimeoutError, HTTPException, OSError) as error:
    late = isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)
    if late:
      raise NoAnswer("timeout", f"no answer within {endpoint.seconds:g} s", True) from None
    raise NoAnswer("unreachable", str(getattr(error, "reason", error)), True) from None
  return answer


def _content(answer: bytes) -> str:
  try:
    content = json.loads(answer)["choices"][0]["message"]["content"]
  except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
    raise NoAnswer("junk", f"no chat completion ({type(error).__name__})", False) from None
  if not isinstance(content, str) or not content.strip():
    raise NoAnswer("junk", "an empty answer", False)
  return content.strip()


def tell(frames: Sequence[tuple[float, bytes]], say: Callable[[str, Sequence[bytes]], str]) -> str:
  """One caption of a clip. frames: (seconds, PNG) of its key frames, one or more. say: `ask` of an endpoint."""
  notes = [say(FIRST.format(now=frames[0][0]), [frames[0][1]])]
  for (before, last), (now, png) in itertools.pairwise(frames):
    notes.append(say(NEXT.format(before=before, now=now, said=notes[-1]), [last, png]))
  if len(notes) == 1:
    return notes[0]
  listed = "\n".join(f"{seconds:.1f} s: {note}" for (seconds, _), note in zip(frames, notes, strict=True))
  return say(MERGE.format(notes=listed), [])
