"""How the embedded cartoons are drawn: a canvas, characters that move, and the scenery behind them. See toons.py.

Lengths are in hundredths of the frame's height; y grows downward. A character's feet are its origin, its height is 100.
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import aggdraw
import numpy as np

Colour = tuple[int, int, int]
TAU = 2 * np.pi
PAINTS = {
  "red": (226, 62, 52), "orange": (245, 140, 40), "yellow": (250, 208, 60), "green": (76, 175, 80),
  "teal": (32, 170, 160), "blue": (60, 120, 220), "purple": (140, 84, 190), "pink": (245, 130, 170),
  "brown": (150, 96, 62), "white": (245, 243, 238), "grey": (130, 136, 148)}
# Colours of the sky, sun or moon, cloud, far hills, near hills, leaves, ground, path
PLACES = {
  "on a sunny day": "8fd3ff fff3a0 ffffff a5dba0 7cc576 3f9b55 97d36b e8d8a0",
  "at dusk": "ff9a6b ffe08a ffc2a0 b5607a 8a4a70 5d3560 7a5570 a0707a",
  "at night": "1b2450 f4f1c9 34407a 28356a 1f2a55 14304a 24405a 3a5070",
  "at dawn": "ffd9c7 fff6d8 fff0ea c9b6e0 a898cf 6f8fb0 b9cf9a efe0c0",
  "in autumn": "d7e6ea fff0b0 ffffff e0a95a c8803a d8572a cfa04a 9a6b40",
  "in the snow": "b9cfe6 fffbe6 f2f7ff dfeaf5 c3d6ea 5f8f8a f4f8fd d2deea",
  "in the desert": "6fd0d8 fff2b0 f5fbff e9a468 d9854f 7aa04a f2cf8a d9a86a",
  "by the sea": "4fa4f0 ffef90 eef8ff 2f7fc4 3b93cf 2f9a6a f3e2b0 d8c080"}
LAYERS = {"sky": .08, "far hills": .25, "near hills": .45, "houses and trees": .7, "ground": 1., "foreground": 1.25}


def shade(colour: Colour, by: float) -> Colour:
  """Darker (by < 1) or lighter (by > 1)."""
  return tuple(int(min(255, c * by)) for c in colour)


class Canvas:
  """The frame being drawn, and beside it the plane on which only the main character is white.

  ink: None draws colour alone; 255 also marks the shape as the main character; 0 marks it as standing before that.
  """

  def __init__(self, height: int, width: int, background: Colour):
    self.size, self.unit = (height, width), height / 100
    self.colour = aggdraw.Draw("RGB", (width, height), background)
    self.plane = aggdraw.Draw("L", (width, height), 0)
    self.ink, self.line = None, max(.6, height / 75)
    self.at()

  def at(self, x: float = 0, y: float = 0, sx: float = 1, sy: float = 1, lean: float = 0) -> None:
    """Sets the origin, the scale and the lean (radians, to the right) of what is drawn next."""
    u, c, s = self.unit, np.cos(lean), np.sin(lean)
    self.matrix = (u * sx * c, -u * sy * s, u * x, u * sx * s, u * sy * c, u * y)
    self.scale = u * (sx + sy) / 2
    self.colour.settransform(self.matrix)
    self.plane.settransform(self.matrix)

  def _draw(self, kind: str, shape: tuple, colour: Colour, outline: bool) -> None:
    pen = aggdraw.Pen(shade(colour, .45), self.line) if outline else None
    getattr(self.colour, kind)(shape, pen, aggdraw.Brush(colour))
    if self.ink is not None:
      pen = aggdraw.Pen(self.ink, self.line) if outline else None
      getattr(self.plane, kind)(shape, pen, aggdraw.Brush((self.ink,) * 3))

  def oval(self, x: float, y: float, rx: float, ry: float, colour: Colour, outline: bool = True) -> None:
    self._draw("ellipse", (x - rx, y - ry, x + rx, y + ry), colour, outline)

  def shape(self, points, colour: Colour, outline: bool = True) -> None:
    self._draw("polygon", tuple(np.ravel(points).tolist()), colour, outline)

  def limb(self, points, width: float, colour: Colour) -> None:
    """A bent line with round ends: arms, legs, tails. Width in the units of the moment."""
    flat = tuple(np.ravel(points).tolist())
    ends = (flat[:2], flat[-2:])
    for ink, grow in ((shade(colour, .45), 2 * self.line), (colour, 0)):
      across = width * self.scale + grow
      self._stroke(flat, ends, across, ink)

  def _stroke(self, flat: tuple, ends: tuple, across: float, ink: Colour) -> None:
    radius = across / 2 / self.scale
    for plane, colour in ((self.colour, ink), (self.plane, (self.ink,) * 3)):
      if plane is self.colour or self.ink is not None:
        plane.line(flat, aggdraw.Pen(colour, across))
        for x, y in ends:
          plane.ellipse((x - radius, y - radius, x + radius, y + radius), None, aggdraw.Brush(colour))

  def frame(self) -> tuple[np.ndarray, np.ndarray]:
    """The picture, uint8 [H, W, 3], and where the main character is seen, bool [H, W]."""
    height, width = self.size
    colour = np.frombuffer(self.colour.tobytes(), np.uint8).reshape(height, width, 3)
    return colour, np.frombuffer(self.plane.tobytes(), np.uint8).reshape(height, width) >= 128


@dataclass
class Pose:
  """Where a character is and how it holds itself. x, y: feet, y up from its ground line; facing: 1 right .. -1 left."""
  x: float
  y: float = 0.
  squash: float = 1.
  lean: float = 0.
  facing: float = 1.
  arms: tuple[float, float] = (.35, .35)   # radians out from hanging down
  legs: tuple[float, float] = (0., 0.)
  smile: float = 1.


# An action: seconds u, period p seconds, direction d (1 right, -1 left), speed v in units/s, start x0 -> pose.
def walk(u, p, d, v, x0):
  swing = np.sin(TAU * u / p)
  return Pose(x0 + v * u, 1.5 - 1.5 * np.cos(2 * TAU * u / p), lean=.06 * d, facing=d,
              arms=(.5 + .5 * swing, .5 - .5 * swing), legs=(.6 * swing, -.6 * swing))


def hop(u, p, d, v, x0):
  rise = np.sin(np.pi * ((u / p) % 1))
  return Pose(x0 + v * u, 26 * rise, .8 + .32 * rise, .12 * d * np.cos(TAU * u / p), d, (.4 + 1.6 * rise,) * 2,
              (.5 * rise, -.5 * rise), rise)


def fly(u, p, d, v, x0):
  return Pose(x0 + v * u, 26 + 7 * np.sin(TAU * u / (1.7 * p)), 1 + .05 * np.sin(TAU * u / p), .15 * d, d,
              (1.5 + np.sin(TAU * u / p),) * 2, (-.5 * d, -.7 * d))


def wave(u, p, d, v, x0):
  return Pose(x0 + v * u, 0, 1 + .05 * np.sin(TAU * u / p), .05 * np.sin(TAU * u / (2 * p)), d,
              (.4, 2.4 + .5 * np.sin(TAU * u / p)))


def dance(u, p, d, v, x0):
  beat = np.sin(TAU * u / p)
  return Pose(x0 + v * u, 4 * beat * beat, 1 - .1 * np.cos(2 * TAU * u / p), .2 * beat, .6 * d,
              (1.6 + .8 * beat, 1.6 - .8 * beat), (.25 * beat, .25 * beat))


def turn(u, p, d, v, x0):
  return Pose(x0 + v * u, 0, 1 + .05 * np.sin(TAU * u / p), 0, d * np.cos(TAU * u / (2.5 * p)), (.9, .9))


ACTIONS: dict[str, tuple[Callable, str]] = {
  "walk": (walk, "walks"), "hop": (hop, "hops"), "fly": (fly, "flies"), "wave": (wave, "waves"),
  "dance": (dance, "dances"), "turn": (turn, "turns around")}
MOVING = ("walk", "hop", "fly")
KINDS = ("cat", "rabbit", "bear", "bird", "robot", "child")
BUILDS = {"tall": (.72, 1.1), "small": (.9, .8), "round": (1.15, .95), "plump": (1., 1.)}  # width, height of the body


@dataclass
class Character:
  """One figure and what it does in a shot."""
  kind: str
  build: str
  paint: str
  trim: str                                # the second colour: limbs, hat, muzzle
  action: str
  height: float                            # of the whole figure, hundredths of the frame's height
  ground: float                            # y of the feet
  motion: tuple[float, float, float, float]  # period s, direction, speed units/s, x at 0 s
  blink: float                             # seconds at which it first blinks

  def name(self) -> str:
    return f"{self.build} {self.paint} {self.kind}"

  def pose(self, u: float) -> Pose:
    return ACTIONS[self.action][0](u, *self.motion)


def draw_character(canvas: Canvas, who: Character, u: float, camera: float) -> tuple[float, float]:
  """Draws one character at `u` seconds into its shot; returns the pixel x, y of its body's middle."""
  pose, wide, tall = who.pose(u), *BUILDS[who.build]
  size, x = who.height / 100, pose.x - camera
  y = who.ground - pose.y * size
  canvas.at(x, who.ground, size, size)
  if canvas.ink != 255:  # the shadow belongs to the ground, and the main character's mask is the character alone
    canvas.oval(0, 0, 26 * wide - pose.y * .3, 4, shade(PAINTS["grey"], .6), outline=False)
  canvas.at(x, y, size / pose.squash, size * pose.squash, pose.lean)
  body, trim = PAINTS[who.paint], PAINTS[who.trim]
  rx, ry = 25 * wide, 24 * tall
  hip, top = -18., -18 - 2 * ry
  side = pose.facing
  if who.kind in ("cat", "rabbit", "bear"):
    tip = -(rx + 13) * side, hip - 24 + 6 * np.sin(3 * u)
    canvas.limb([(-rx * side * .6, hip - 6), (-(rx + 9) * side, hip - 12), tip], 7, body)
  arm = 19 * tall
  for far in (True, False):  # far limbs behind the body, near ones before it
    sign = -1 if far else 1
    angle, step = pose.arms[0 if far else 1], pose.legs[0 if far else 1]
    colour = shade(trim, .8) if far else trim
    foot = (sign * 8 * wide + 20 * np.sin(step), hip + 18 * np.cos(step))
    canvas.limb([(sign * 8 * wide, hip - 4), foot], 9, colour)
    canvas.oval(foot[0] + 4 * side, foot[1] - 1.5, 8, 4.5, colour)
    if far:
      _reach(canvas, (-rx * .75, hip - ry * 1.1), -1, angle, arm, colour)
      _body(canvas, who.kind, (rx, ry, hip), body, trim, side)
    else:
      _face(canvas, who, u, pose, (rx, ry, top))
      _reach(canvas, (rx * .75, hip - ry * 1.1), 1, angle, arm, colour)
  _, b, c, _, e, f = canvas.matrix
  return b * (hip - ry) + c, e * (hip - ry) + f


def _reach(canvas: Canvas, shoulder: tuple, sign: int, angle: float, length: float, colour: Colour) -> None:
  """An arm bent at the elbow, `angle` radians out from hanging down."""
  x, y = shoulder
  elbow = x + sign * length * .5 * np.sin(angle), y + length * .5 * np.cos(angle)
  hand = elbow[0] + sign * length * .55 * np.sin(angle + .3), elbow[1] + length * .55 * np.cos(angle + .3)
  canvas.limb([(x, y), elbow, hand], 7, colour)


def _body(canvas: Canvas, kind: str, sizes: tuple, body: Colour, trim: Colour, side: float) -> None:
  """The trunk, which is the head as well, and the ears, tuft or hat of the kind."""
  rx, ry, hip = sizes
  top = hip - 2 * ry
  for ear in (-1, 1):
    x = ear * rx * .6 + 3 * side
    if kind == "cat":
      canvas.shape([(x - 9, top + 12), (x + ear * 7, top - 15), (x + 9, top + 12)], body)
    elif kind == "rabbit":
      canvas.oval(x, top - 8, 6.5, 20, body)
      canvas.oval(x, top - 8, 3, 14, trim, outline=False)
    elif kind == "bear":
      canvas.oval(x, top + 4, 9.5, 9.5, body)
  if kind == "robot":
    canvas.limb([(0, top + 4), (4 * side, top - 12)], 4, trim)
    canvas.oval(4 * side, top - 14, 6, 6, PAINTS["red"])
    canvas.shape([(-rx, hip), (-rx, top + 5), (-rx + 6, top), (rx - 6, top), (rx, top + 5), (rx, hip)], body)
  elif kind == "bird":
    canvas.limb([(-4 * side, top + 6), (-12 * side, top - 10)], 6, trim)
    canvas.oval(0, hip - ry, rx, ry, body)
  else:
    canvas.oval(0, hip - ry, rx, ry, body)
  canvas.oval(4 * side, hip - ry * .55, rx * .6, ry * .5, shade(trim, 1.15), outline=False)
  if kind == "child":
    canvas.shape([(-rx * .8, top + 10), (rx * .8, top + 10), (3 * side, top - 20)], trim)
    canvas.oval(3 * side, top - 20, 5.5, 5.5, PAINTS["white"])


def _face(canvas: Canvas, who: Character, u: float, pose: Pose, sizes: tuple) -> None:
  """Eyes that blink, cheeks, and a mouth or beak, all slid toward where the character looks."""
  rx, ry, top = sizes
  y, shift, dark = top + ry * .75, pose.facing * rx * .3, (40, 34, 44)
  open_ = float(np.clip(abs(((u - who.blink) % 2.3) - .12) / .12, .12, 1))
  for eye in (-1, 1):
    x = shift + eye * rx * .36
    canvas.oval(x, y, 7, 8.5 * open_, (255, 255, 255))
    canvas.oval(x + 2 * pose.facing, y, 3.4, 4.6 * open_, dark, outline=False)
    canvas.oval(shift + eye * rx * .6, y + 11, 3.6, 2.4, PAINTS["pink"], outline=False)
  if who.kind == "bird":
    canvas.shape([(shift - 6, y + 6), (shift + 6, y + 6), (shift + 15 * pose.facing, y + 13)], PAINTS["orange"])
  else:
    canvas.oval(shift, y + 13, 5.5, 1.2 + 2.6 * max(pose.smile, 0), dark, outline=False)


@dataclass
class Scenery:
  """What stands behind the characters, on a strip wider than the frame. Colours in the order of PLACES."""
  place: str
  colours: list[Colour]
  sun: tuple[float, float, float]
  clouds: np.ndarray                       # [n, 3]: x, y, size
  waves: np.ndarray                        # [2, 3, 3]: far, near hills; three waves of height, length, phase
  things: list[tuple[str, float, float, Colour]]  # kind, x, size, colour: houses and trees
  tufts: np.ndarray                        # [n, 3]: x, y, size on the ground
  bushes: list[float]                      # x of the bushes before everything


def make_scenery(rng: np.random.Generator, place: str, reach: tuple[float, float]) -> Scenery:
  """Scenery for a camera whose left edge moves within `reach` (units)."""
  start, end = reach
  def turned(code):
    h, l, s = colorsys.rgb_to_hls(*(int(code[i:i + 2], 16) / 255 for i in (0, 2, 4)))
    return tuple(int(255 * c) for c in colorsys.hls_to_rgb((h + hue) % 1, l, s))
  hue = rng.uniform(-.03, .03)
  def along(gap, margin=60):
    xs, x = [], start - margin
    while x < end + margin:
      xs.append(x := x + rng.uniform(.6, 1.4) * gap)
    return xs
  waves = np.stack([rng.uniform([3, 60, 0], [9, 200, TAU], (3, 3)) for _ in range(2)])
  things = [(str(rng.choice(["house", "tree", "tree", "pine"])), x, rng.uniform(26, 44),
             PAINTS[str(rng.choice(list(PAINTS)))]) for x in along(52)]
  return Scenery(place, [turned(c) for c in PLACES[place].split()],
                 (rng.uniform(15, 120), rng.uniform(10, 28), rng.uniform(6, 11)),
                 np.array([(x, rng.uniform(6, 34), rng.uniform(.7, 1.5)) for x in along(55)]), waves, things,
                 np.array([(x, rng.uniform(80, 98), rng.uniform(1, 3)) for x in along(14)]),
                 along(150) if rng.random() < .3 else [])


def draw_back(canvas: Canvas, scene: Scenery, camera: float, width: float) -> None:
  """Sky, hills, houses and trees, ground: from far to near."""
  _, sun, cloud, far, near, leaves, ground, path = scene.colours
  canvas.at()
  canvas.oval(scene.sun[0], scene.sun[1], scene.sun[2], scene.sun[2], sun, outline=False)
  for x, y, size in scene.clouds:
    x = x - LAYERS["sky"] * camera
    for dx, r in ((-9, 5), (0, 8), (9, 6)):
      canvas.oval(x + dx * size, y, r * size * 1.3, r * size * .7, cloud, outline=False)
  xs = np.arange(-2, width + 6, 4)
  for name, colour, base, waves in (("far hills", far, 52, scene.waves[0]), ("near hills", near, 62, scene.waves[1])):
    at = xs + LAYERS[name] * camera
    ys = base + sum(a * np.sin(TAU * at / b + c) for a, b, c in waves)
    canvas.shape([(-2, 101), *zip(xs, ys, strict=True), (xs[-1], 101)], colour, outline=False)
  for kind, x, size, colour in scene.things:
    x -= LAYERS["houses and trees"] * camera
    if -40 < x < width + 40:
      draw_thing(canvas, kind, (x, 76., size), colour, leaves)
  canvas.at()
  canvas.shape([(-1, 75), (width + 1, 75), (width + 1, 101), (-1, 101)], ground, outline=False)
  canvas.shape([(-1, 84), (width + 1, 84), (width + 1, 92), (-1, 92)], path, outline=False)
  for x, y, size in scene.tufts:
    canvas.oval(x - camera, y, size * 1.6, size * .7, shade(ground, .78), outline=False)


def draw_front(canvas: Canvas, scene: Scenery, camera: float) -> None:
  """The bushes before everything."""
  for x in scene.bushes:
    canvas.at(x - LAYERS["foreground"] * camera, 102)
    for dx, r in ((-11, 9), (0, 13), (12, 9)):
      canvas.oval(dx, 0, r, r, shade(scene.colours[5], .7), outline=False)


def contrast(place: str, other: str) -> float:
  """How hard a cut between two places is: the mean change of hue (0 .. 180), saturation and value (0 .. 255)."""
  shares = np.array([.4, 0, 0, .12, .13, 0, .25, .1])[:, None]
  def paint(name):
    hsv = [colorsys.rgb_to_hsv(*(int(code[i:i + 2], 16) / 255 for i in (0, 2, 4))) for code in PLACES[name].split()]
    return np.array(hsv) * (180, 255, 255)
  return float((abs(paint(place) - paint(other)) * shares).sum() / 3)


def draw_thing(canvas: Canvas, kind: str, spot: tuple[float, float, float], colour: Colour, leaves: Colour) -> None:
  """A house, a tree or a pine standing at `spot` = (x, y of the foot, height)."""
  x, y, size = spot
  canvas.at(x, y, size / 100, size / 100)
  if kind == "house":
    canvas.shape([(-38, 0), (-38, -60), (38, -60), (38, 0)], colour)
    canvas.shape([(-48, -56), (0, -102), (48, -56)], shade(colour, .65))
    canvas.shape([(-8, 0), (-8, -32), (12, -32), (12, 0)], shade(colour, .5))
    canvas.oval(-22, -38, 8, 8, (255, 240, 170))
  elif kind == "tree":
    canvas.limb([(0, 0), (0, -45)], 14, (120, 82, 56))
    for dx, dy, r in ((-16, -58, 24), (16, -60, 24), (0, -78, 28)):
      canvas.oval(dx, dy, r, r, leaves, outline=False)
  else:
    canvas.limb([(0, 0), (0, -20)], 12, (120, 82, 56))
    for k in range(3):
      canvas.shape([(-30 + 6 * k, -16 - 26 * k), (30 - 6 * k, -16 - 26 * k), (0, -62 - 26 * k)], shade(leaves, .8))
