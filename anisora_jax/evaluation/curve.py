"""Curves over training steps as inline SVG, coloured by the page that holds them."""

import math
from dataclasses import dataclass
from html import escape

import numpy as np

WIDE, TALL = 560, 260                        # drawing area with its labels, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 52, 88, 12, 30    # room for labels
POINTS = 400                                 # most points of a line: a long run must not make a huge page


@dataclass(frozen=True)
class Line:
  """One curve. steps, values: equally long, finite. number: of the colour, 0 .. 5; faint: drawn behind, unlabelled."""

  name: str
  steps: list[float]
  values: list[float]
  number: int = 0
  faint: bool = False


def series(measures: list[dict], name: str) -> tuple[list[float], list[float]]:
  """Steps and values of one measure, where it was reported and finite."""
  found = [(row["step"], row[name]) for row in measures
           if isinstance(row.get(name), int | float) and math.isfinite(row[name])]
  return [float(step) for step, _ in found], [float(value) for _, value in found]


def smooth(values: list[float], window: int) -> list[float]:
  """Centred moving mean over `window` values, over fewer at the ends."""
  kernel = np.ones(max(1, min(window, len(values))))
  total = np.convolve(values, kernel, "same") if values else np.zeros(0)
  return (total / np.convolve(np.ones(len(values)), kernel, "same") if values else total).tolist()


def _thin(line: Line) -> tuple[np.ndarray, np.ndarray]:
  """At most POINTS points: means of equal runs of neighbours."""
  parts = np.array_split(np.arange(len(line.steps)), min(POINTS, len(line.steps)))
  means = [(np.mean(np.take(line.steps, part)), np.mean(np.take(line.values, part))) for part in parts]
  return np.array([step for step, _ in means]), np.array([value for _, value in means])


def ticks(low: float, high: float, most: int = 6) -> list[float]:
  """Round numbers (1, 2, 5 x 10^k) between low and high, at most `most`."""
  if high <= low:
    return [low]
  power = 10.0 ** math.floor(math.log10((high - low) / most))
  for step in (m * power for m in (1, 2, 5, 10, 20)):
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last - first < most:
      break
  return [round(k * step, 12) for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
  """1, 2, 5 x 10^k between low and high."""
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  return [m * 10.0 ** k for k in powers for m in (1, 2, 5) if low <= m * 10.0 ** k <= high]


def _label(value: float) -> str:
  return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:.3g}"


def _spread(wanted: list[float], gap: int) -> list[float]:
  """Heights of labels, in the order given, moved down until no two are nearer than `gap`."""
  placed: dict[int, float] = {}
  floor = -math.inf
  for number in sorted(range(len(wanted)), key=lambda number: wanted[number]):
    floor = placed[number] = max(wanted[number], floor + gap)
  return [placed[number] for number in range(len(wanted))]


def chart(title: str, lines: list[Line]) -> str:
  """An SVG with one axis of steps and one of values, logarithmic where they span more than a factor 8.

  Lines are labelled at their right end. Without any point it is a line of text.
  """
  lines = [line for line in lines if line.steps]
  if not lines:
    return f'<p class="soft">{escape(title)}: nothing was reported.</p>'
  data = [_thin(line) for line in lines]
  low, high = (pick(np.concatenate([values for _, values in data])) for pick in (np.min, np.max))
  log = low > 0 and high / low > 8
  first, last = 0.0, float(max(steps.max() for steps, _ in data))
  bottom, up = (math.log(low), math.log(high)) if log else (float(low), float(high))
  bottom, up = bottom - 0.04 * (up - bottom or 1), up + 0.04 * (up - bottom or 1)

  def x(step):
    return LEFT + (np.asarray(step) - first) / (last - first or 1) * (WIDE - LEFT - RIGHT)

  def y(value):
    return TOP + (up - (np.log(value) if log else np.asarray(value))) / (up - bottom) * (TALL - TOP - BOTTOM)

  out = [f'<svg viewBox="0 0 {WIDE} {TALL}" role="img"><title>{escape(title)}</title>']
  for value in _log_ticks(low, high) if log else ticks(low, high):
    out.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDE - RIGHT}"/>'
               f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{_label(value)}</text>')
  for step in ticks(first, last):
    out.append(f'<text x="{x(step):.1f}" y="{TALL - 8}" text-anchor="middle">{_label(step)}</text>')
  for line, (steps, values) in zip(lines, data, strict=True):
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x(steps), y(values), strict=True))
    kind = f"line{line.number % 6}" + (" faint" if line.faint else "")
    # A lone point has no length: a round cap makes it a dot.
    out.append(f'<polyline class="{kind}" points="{points if len(steps) > 1 else points + " " + points}"/>')
  named = [(line, values[-1]) for line, (_, values) in zip(lines, data, strict=True) if not line.faint]
  for (line, _), height in zip(named, _spread([float(y(value)) for _, value in named], 15), strict=True):
    out.append(f'<text class="name line{line.number % 6}" x="{WIDE - RIGHT + 8}" y="{height + 4:.1f}">'
               f'{escape(line.name)}</text>')
  return "".join([*out, "</svg>"])
