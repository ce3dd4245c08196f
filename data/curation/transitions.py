"""Where one scene ends and the next begins: hard cuts, and with `gradual` fades and dissolves.

PySceneDetect's ContentDetector and AdaptiveDetector name frames that differ from the one before, generously; each is
then held against what only looks like a cut. Pictures that motion explains belong together; a flash, an impact frame or
a strobe comes back to its scene; and where every drawing differs wildly from the last, in a whip pan, only a change of
all colours is a cut.
ThresholdDetector adds the fades through black whose ways down and up are too uneven for `gradual`.
Repeated drawings (animation on twos, on threes) are passed over first, so that a pan on threes is no row of cuts.
"""

from collections.abc import Iterator

import cv2
import numpy as np
from jaxtyping import UInt8
from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode, ThresholdDetector

from curation import gradual, likeness
from curation.gradual import BRIEF, Transition

CORE = 16.      # seconds judged at once ...
MARGIN = 4.     # ... with so much before and after at hand
HELD = .4       # seconds: changes so near and no more than 3 drawings apart are judged together, and those within BRIEF
DARK = 6        # mean brightness of a black picture, grey levels
BLACK = .35     # seconds: shorter darkness is a flash
SAME = .7       # mean difference below which a drawing is repeated, grey levels
AGAIN = .35     # share of unexplained pixels below which a scene has surely come back
TURMOIL = 3     # so many changes at one place are no cut ...
STRANGE = .2    # ... but for one that leaves fewer colours than this share


class Finder:
  """Fed a film's small frames in order, gives its transitions in order, holding only a window of frames."""

  def __init__(self, fps: float, content: float, adaptive: float):
    self.fps, self.first, self.done = fps, 0, 0
    self.held: list[np.ndarray] = []
    self.drawn: np.ndarray | None = None  # the last drawing, which a still leaves behind the window
    self.drawings: list[int] = []   # frames that are not repeated, of the window
    self.suspects: list[int] = []
    self.lit: list[int] = []        # frames at which the picture comes out of the dark
    self.detectors = (ContentDetector(threshold=content, min_scene_len=0),
                      AdaptiveDetector(adaptive_threshold=adaptive, min_content_val=6, min_scene_len=0))
    self.dark = ThresholdDetector(threshold=DARK, min_scene_len=0, fade_bias=1., min_out_length=round(BLACK * fps))

  def push(self, number: int, small: UInt8[np.ndarray, "h w 3"]) -> Iterator[Transition]:
    """Takes frame `number`; yields transitions that are certain now."""
    if self.drawn is None or cv2.norm(small, self.drawn, cv2.NORM_L1) > SAME * small.size:
      self.drawn = small
      self.drawings.append(number)
      blue_first, time = np.ascontiguousarray(small[..., ::-1]), FrameTimecode(number, self.fps)
      for detector in self.detectors:
        self.suspects += [cut.frame_num for cut in detector.process_frame(time, blue_first)]
    self.lit += [cut.frame_num for cut in self.dark.process_frame(FrameTimecode(number, self.fps), small)]
    self.held.append(small)
    if number + 1 - self.done >= round((CORE + MARGIN) * self.fps):
      yield from self._judge(self.done + round(CORE * self.fps))

  def end(self) -> Iterator[Transition]:
    """Yields what is left at the end of the film."""
    if self.held:
      yield from self._judge(self.first + len(self.held))

  def _judge(self, stop: int) -> Iterator[Transition]:
    """Yields transitions that begin in [done, stop), and forgets what is no longer needed."""
    small, first = np.stack(self.held), self.first
    found = [Transition(t.kind, t.start + first, t.stop + first) for t in gradual.find(small, self.fps, first)]
    # What looks like a cut at the ends of a fade is its first or last step.
    near = round(BRIEF * self.fps) + 1
    soft = [range(t.start - near * (t.kind == "fade"), t.stop + 3) for t in found]
    suspects = [n for n in sorted(set(self.suspects)) if not any(n in each for each in soft)]
    found += self._cuts(small, suspects)
    found += [Transition("fade", n, n) for n in self.lit
              if not any(t.start - near <= n <= t.stop + near for t in found)]
    yield from sorted((t for t in found if self.done <= t.start < stop), key=lambda t: (t.start, t.stop))
    self.done = stop
    keep = max(first, stop - round(MARGIN * self.fps))
    self.held, self.first = self.held[keep - first:], keep
    self.drawings = [n for n in self.drawings if n >= keep]
    self.suspects = [n for n in self.suspects if n >= keep]
    self.lit = [n for n in self.lit if n >= keep]

  def _cuts(self, small: UInt8[np.ndarray, "n h w 3"], suspects: list[int]) -> list[Transition]:
    def differ(a: int, b: int) -> bool:
      return likeness.unexplained(small[a - self.first], small[b - self.first]) > likeness.OTHER
    cuts = []
    for group in self._groups([n for n in suspects if n > self.first and differ(n - 1, n)]):
      alone, n = [], 0
      while n < len(group):
        # The last change after which the picture is again what it was before this one: a flash lies between.
        back = [m for m in range(n + 1, len(group)) if not differ(group[n] - 1, group[m])]
        alone += [] if back else [group[n]]
        n = (back[-1] if back else n) + 1
      if len(alone) >= TURMOIL:
        alone = [n for n in alone if likeness.palette(small[n - 1 - self.first], small[n - self.first]) < STRANGE][:1]
      alone = [n for n in alone if not self._comes_back(n)]
      if alone:
        cuts.append(Transition("cut", alone[0], alone[-1]))
    return cuts

  def _comes_back(self, n: int) -> bool:
    """Whether a scene comes back soon after a change: half a flash, whose other half passed as motion."""
    def same(a: int, b: int) -> bool:
      return likeness.unexplained(self.held[a - self.first], self.held[b - self.first]) < AGAIN
    last, reach = self.first + len(self.held), max(2, round(BRIEF * self.fps))
    step = max(1, reach // 3)
    return (any(same(n - 1, m) for m in range(n + 1, min(last, n + 1 + reach), step)) or
            any(same(m, n) for m in range(n - 2, max(self.first, n - 2 - reach) - 1, -step)))

  def _groups(self, changes: list[int]) -> list[list[int]]:
    """Changes so near each other that there is no shot between them."""
    order = {n: place for place, n in enumerate(self.drawings)}
    groups: list[list[int]] = []
    for n in changes:
      gap = n - groups[-1][-1] if groups else np.inf
      if gap <= BRIEF * self.fps or (gap <= HELD * self.fps and order[n] - order[groups[-1][-1]] <= 3):
        groups[-1].append(n)
      else:
        groups.append([n])
    return groups
