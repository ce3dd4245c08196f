"""Draws the embedded default films: short cartoons, different for every seed, with the truth about them beside.

A film is a few shots of 3 s or more with hard cuts. In a shot one to three characters (cats, rabbits, bears, birds,
robots, children) walk, hop, fly, wave, dance or turn around before a sky, far hills, nearer houses and trees, and the
ground, while the camera pans by 1-2 % of the width per frame (at 12 fps). Everything is flat colour with a dark
outline. Limbs swing, eyes blink, bodies squash and stretch as they hop, and characters pass in front of each other.

For each film NAME, drawn by aggdraw and encoded by PyAV:
  NAME.mp4         H.264 yuv420p, the film
  NAME.masks.npz   "visible": the pixels of the main character that nothing covers, as bits packed over [frames, H, W],
                   which is "shape"
  NAME.json        fps, size, cuts (first frame of each shot but the first), parallax of each layer (share of the
                   camera's x), and of every shot: caption, camera (pixels it has moved right, per frame), and of each
                   character its action, height in pixels and, per frame, pixel x, y of its middle; the first of them
                   is the main one
The json comes last, so a film that has one is complete; complete films are not drawn again.

  python data/toons.py --out out/films --films 64
"""

import io
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import cartoon
import command
import numpy as np
from absl import flags
from tqdm import tqdm

from anisora_jax import errors
from anisora_jax.loaders import video

SHOT_SECONDS = 3.
PAN = (.13, .26)  # widths of the frame a second: 1.1 .. 2.2 % a frame at 12 fps


@dataclass
class Shot:
  """Everything between two cuts. pan: the camera's speed in units/s; characters: the main one first."""
  scene: cartoon.Scenery
  pan: float
  characters: list[cartoon.Character]
  caption: str


def draw_film(seed: int, *, seconds: float = 14, height: int = 96, width: int = 144, fps: float = 12
              ) -> tuple[np.ndarray, np.ndarray, dict]:
  """Draws one film: frames uint8 [F, H, W, 3], where the main character is seen bool [F, H, W], and the truth about it.

  The same arguments give the same film. seconds: of the whole film, cut into shots of 3 s and more.
  """
  rng = np.random.default_rng(seed)
  frames, masks, shots, place = [], [], [], None
  for length in shot_lengths(rng, round(seconds * fps), fps):
    place = str(rng.choice([p for p in cartoon.PLACES if place is None or cartoon.contrast(p, place) > 45]))
    shot = plan_shot(rng, place, length / fps, 100 * width / height)
    drawn = [draw_frame(shot, number / fps, height, width) for number in range(length)]
    shots.append(_truth(shot, len(frames), [middles for _, _, middles in drawn], fps, height))
    frames += [picture for picture, _, _ in drawn]
    masks += [mask for _, mask, _ in drawn]
  truth = {"seed": seed, "fps": fps, "frames": len(frames), "height": height, "width": width, "licence": "CC0-1.0",
           "cuts": [shot["start"] for shot in shots[1:]], "parallax": cartoon.LAYERS, "shots": shots}
  return np.stack(frames), np.stack(masks), truth


def shot_lengths(rng: np.random.Generator, total: int, fps: float) -> list[int]:
  """Cuts `total` frames into shots of 3 s and more, about 4 s on average; too few frames for two shots make one."""
  low = np.ceil(SHOT_SECONDS * fps)
  count = max(1, min(round(total / (1.3 * low)), int(total // low)))
  spare = max(0., total - count * low)
  ends = low * np.arange(1, count) + np.floor(spare * np.cumsum(rng.dirichlet([4] * count)))[:-1]
  return np.diff([0, *ends.astype(int), total]).tolist()


def plan_shot(rng: np.random.Generator, place: str, seconds: float, width: float) -> Shot:
  """Draws lots for one shot. seconds: its length; width: of the frame, in units."""
  pan = rng.uniform(*PAN) * width * rng.choice([-1, 1])
  actions = [_choose_action(rng) for _ in range(rng.choice([1, 2, 3], p=[.4, .45, .15]))]
  if any(action not in cartoon.MOVING for _, action in actions):
    # Who stays in place drifts out of the picture as fast as the camera moves.
    pan = np.sign(pan) * min(abs(pan), .72 * width / seconds)
  scene = cartoon.make_scenery(rng, place, (min(0, pan * seconds), max(0, pan * seconds) + width))
  characters = []
  for number, (kind, action) in enumerate(actions):
    drift = -pan
    if action in cartoon.MOVING:
      drift = rng.uniform(.05, .6) * width / seconds * rng.choice([-1, 1])
      drift = -drift if abs(pan + drift) < .06 * width else drift
    middle = width * (.5 + rng.uniform(-.1, .1) + (number and rng.choice([-1, 1]) * rng.uniform(.2, .36)))
    speed = pan + drift
    direction = np.sign(speed) or rng.choice([-1, 1])
    paint, trim = (str(name) for name in rng.choice(list(cartoon.PAINTS), 2, replace=False))
    motion = (rng.uniform(1.4, 2.2), float(direction), float(speed), float(middle - drift * seconds / 2))
    characters.append(cartoon.Character(
      kind, str(rng.choice(list(cartoon.BUILDS))), paint, trim, action, rng.uniform(50, 66) - 4 * bool(number),
      rng.uniform(86, 94) + (number and rng.uniform(-5, 5)), motion, blink=rng.uniform(0, 2.3)))
  return Shot(scene, float(pan), characters, _caption(scene, pan, characters))


def _choose_action(rng: np.random.Generator) -> tuple[str, str]:
  """A kind of character and what it does; only birds fly."""
  kind = str(rng.choice(cartoon.KINDS))
  allowed = [name for name in cartoon.ACTIONS if name != "fly" or kind == "bird"]
  moves = [name for name in allowed if name in cartoon.MOVING]
  return kind, str(rng.choice(moves if rng.random() < .6 else allowed))


def _caption(scene: cartoon.Scenery, pan: float, characters: list[cartoon.Character]) -> str:
  def told(who):
    way = (" right" if who.motion[2] > 0 else " left") if who.action in cartoon.MOVING else ""
    return f"a {who.name()} {cartoon.ACTIONS[who.action][1]}{way}"
  past = " past a house" if any(thing[0] == "house" for thing in scene.things) else ""
  others = "".join(f", {told(who)}" for who in characters[1:])
  return f"{told(characters[0])}{past} {scene.place}{others}, while the camera pans {'right' if pan > 0 else 'left'}"


def draw_frame(shot: Shot, u: float, height: int, width: int) -> tuple[np.ndarray, np.ndarray, list]:
  """The frame at `u` seconds: picture, mask of the main character, and pixel (x, y) of every character's middle."""
  camera = shot.pan * u
  canvas = cartoon.Canvas(height, width, shot.scene.colours[0])
  cartoon.draw_back(canvas, shot.scene, camera, 100 * width / height)
  middles = {}
  for number in sorted(range(len(shot.characters)), key=lambda n: shot.characters[n].ground):
    canvas.ink = 255 if number == 0 else (0 if 0 in middles else None)
    middles[number] = cartoon.draw_character(canvas, shot.characters[number], u, camera)
  canvas.ink = 0
  cartoon.draw_front(canvas, shot.scene, camera)
  return *canvas.frame(), [middles[number] for number in range(len(shot.characters))]


def _truth(shot: Shot, start: int, middles: list, fps: float, height: int) -> dict:
  """What the json says of one shot. middles: [frames][characters] pixel x, y."""
  def rounded(values):
    return [round(float(v), 2) for v in values]
  camera = [shot.pan * number / fps * height / 100 for number in range(len(middles))]
  return {"start": start, "end": start + len(middles), "caption": shot.caption, "camera": rounded(camera),
          "characters": [{"name": who.name(), "action": who.action, "height": round(who.height * height / 100, 2),
                          "x": rounded(m[n][0] for m in middles), "y": rounded(m[n][1] for m in middles)}
                         for n, who in enumerate(shot.characters)]}


def write_film(folder: Path, name: str, film: tuple[np.ndarray, np.ndarray, dict]) -> None:
  """Writes what `draw_film` drew as NAME.mp4, NAME.masks.npz and, last, NAME.json. A kill leaves no half file."""
  frames, masks, truth = film
  packed = io.BytesIO()
  np.savez_compressed(packed, visible=np.packbits(masks), shape=np.array(masks.shape))
  for suffix, content in ((".mp4", video.encode(frames, float(truth["fps"]))), (".masks.npz", packed.getvalue()),
                          (".json", json.dumps(truth).encode())):
    unfinished = folder / f".{name}{suffix}.partial"
    unfinished.write_bytes(content)
    unfinished.replace(folder / (name + suffix))


def make(folder: str, name: str, settings: dict) -> None:
  """Draws and writes one film unless it is complete. settings: the arguments of `draw_film`."""
  write_film(Path(folder), name, draw_film(**settings))


def main(flags_: flags.FlagValues) -> None:
  """Checks the flags and draws the films that are missing, over all workers."""
  check(flags_)
  folder = Path(flags_.out)
  folder.mkdir(parents=True, exist_ok=True)
  shared = {name: getattr(flags_, name) for name in ("seconds", "height", "width", "fps")}
  films = {f"toon-{flags_.seed}-{n:04}": {"seed": flags_.seed * 10**6 + n, **shared} for n in range(flags_.films)}
  missing = {name: settings for name, settings in films.items() if not _complete(folder / f"{name}.json", settings)}
  with ProcessPoolExecutor(min(flags_.workers, max(1, len(missing))), multiprocessing.get_context("spawn")) as pool:
    tasks = [pool.submit(make, str(folder), name, settings) for name, settings in missing.items()]
    for task in tqdm(as_completed(tasks), total=len(tasks), desc="films drawn", unit="film"):
      task.result()
  print(f"{folder}: {len(films)} films of {flags_.seconds:g} s, {len(missing)} of them drawn now")


def _complete(path: Path, settings: dict) -> bool:
  """Whether a film is there already; one drawn with other settings is refused, so that no folder mixes two sets."""
  if not path.exists():
    return False
  truth = json.loads(path.read_text())
  differing = {key for key in ("seed", "fps", "height", "width") if truth[key] != settings[key]}
  if differing or truth["frames"] != round(settings["seconds"] * settings["fps"]):
    raise errors.BadInput(f"{path} was drawn with other settings ({', '.join(sorted(differing)) or 'seconds'}): "
                          "take another --out, or the old settings.")
  return True


def check(flags_: flags.FlagValues) -> None:
  """Refuses settings that cannot be drawn."""
  allowed = {"films": (1, 10**5), "seconds": (1, 3600), "height": (32, 2160), "width": (32, 4096), "fps": (1, 120),
             "seed": (0, 2**31), "workers": (1, 256)}
  for name, (low, high) in allowed.items():
    if not low <= getattr(flags_, name) <= high:
      raise errors.BadInput(f"--{name} is {getattr(flags_, name)}: allowed are {low} to {high}.")
  for name in ("height", "width"):
    if getattr(flags_, name) % 2:
      raise errors.BadInput(f"--{name} is {getattr(flags_, name)}: H.264 in yuv420p needs an even number of pixels, "
                            f"for example {getattr(flags_, name) + 1}.")


def define_flags() -> None:
  flags.DEFINE_string("out", "out/films", "Folder the films are written to.")
  flags.DEFINE_integer("films", 32, "Number of films.")
  flags.DEFINE_float("seconds", 14, "Length of a film in seconds; it is cut into shots of about 4 s.")
  flags.DEFINE_integer("height", 96, "Rows of pixels; even.")
  flags.DEFINE_integer("width", 144, "Columns of pixels; even.")
  flags.DEFINE_float("fps", 12, "Frames a second.")
  flags.DEFINE_integer("seed", 0, "Another seed gives another set of films.")
  flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes that draw.")


if __name__ == "__main__":
  command.run(define_flags, main)
