"""report.html: what came in, what was kept, why the rest was not, with films to play. No script, all text escaped."""

from dataclasses import dataclass, field
from html import escape
from itertools import chain

import numpy as np

from anisora_jax.errors import BadInput
from anisora_jax.evaluation import curve, page

WIDE, LINE, LABEL = 960, 34, 120   # of the funnel's drawing, in SVG units
BINS = 24
STYLE = page.STYLE + """
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.25rem; }
.samples figure { margin: 0; padding: .75rem; display: flex; flex-direction: column; gap: .5rem; }
.samples video, .samples .none { width: 100%; aspect-ratio: 16 / 9; margin: 0; border-radius: 6px; object-fit: contain;
  background: #000; image-rendering: auto; }
.samples .none { display: grid; place-items: center; color: #aaa; font-size: .8rem; }
.samples figcaption { margin: 0; font-size: .85rem; }
.samples .id { color: var(--soft); font-size: .75rem; overflow-wrap: anywhere; }
.tag { display: inline-block; border: 1px solid var(--rule); border-radius: 99px; padding: 0 .6rem; font-size: .75rem;
  margin: .1rem .2rem .1rem 0; color: var(--soft); }
.tag.out { color: var(--c0); border-color: var(--c0); }
th:last-child { text-align: left; } summary { cursor: pointer; }
details { font-size: .75rem; color: var(--soft); }
td.words { white-space: normal; text-align: left; overflow-wrap: anywhere; min-width: 16rem; }
.bar { fill: var(--rule); } .bar.kept { fill: var(--c1); } .bar.lost { fill: var(--c0); opacity: .55; }
svg text.ink { fill: var(--ink); } svg text.big { font-size: 15px; font-weight: 600; }
.limit { stroke: var(--c0); stroke-width: 1.5; stroke-dasharray: 4 3; }
"""


@dataclass(frozen=True)
class Settings:
  """kept, rejected: how many clips the page shows. rows: of preview films, pixels. seconds: of a preview at most."""
  kept: int = 24
  rejected: int = 24
  rows: int = 180
  seconds: float = 4.

  def __post_init__(self):
    ranges = {"kept": (0, 1000), "rejected": (0, 1000), "rows": (16, 1080), "seconds": (.1, 60)}
    for name, (low, high) in ranges.items():
      if not low <= getattr(self, name) <= high:
        raise BadInput(f"report.{name} is {getattr(self, name)}: allowed are {low} to {high}.")


@dataclass(frozen=True)
class Step:
  """One stage of the funnel. unit: what is counted. entered = left + sum of reasons."""
  stage: str
  unit: str
  entered: int
  left: int
  reasons: dict[str, int]


@dataclass(frozen=True)
class Histogram:
  """Values of one measure. limits: thresholds of the rules on it."""
  name: str
  kept: list[float]
  lost: list[float]
  limits: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
  """One clip to look at. film, poster: files beside the page; "" where there is no preview. tags: said at once; more:
  said when asked for."""
  id: str
  caption: str
  film: str
  poster: str
  tags: list[str]
  more: list[str]
  reason: str = ""
  detail: str = ""


@dataclass(frozen=True)
class Report:
  """All that the page says. tables: title -> rows, the first of which is the head. charts: title -> lines, note."""
  title: str
  facts: dict[str, str]
  funnel: list[Step]
  histograms: list[Histogram]
  kept: list[Sample]
  rejected: list[Sample]
  tables: dict[str, list[list[str]]] = field(default_factory=dict)
  charts: dict[str, tuple[list[curve.Line], str]] = field(default_factory=dict)


def funnel(steps: list[Step]) -> str:
  """Bars, one a stage, as long as its share of what entered, and beside each what was turned away and why."""
  rows, height = [], LINE * len(steps)
  for number, step in enumerate(steps):
    y, gone = number * LINE + 4, sum(step.reasons.values())
    whole = max(1, step.left + gone)
    scale = (WIDE - LABEL - 330) / whole
    rows.append(
      f'<text class="ink" x="{LABEL - 12}" y="{y + 17}" text-anchor="end">{escape(step.stage)}</text>'
      f'<rect class="bar kept" x="{LABEL}" y="{y}" width="{step.left * scale:.1f}" height="{LINE - 8}" rx="3"/>'
      f'<rect class="bar lost" x="{LABEL + step.left * scale:.1f}" y="{y}" width="{gone * scale:.1f}" '
      f'height="{LINE - 8}" rx="3"/>'
      f'<text class="ink big" x="{WIDE - 318}" y="{y + 18}">{step.left:,}</text>'
      f'<text x="{WIDE - 250}" y="{y + 17}">{escape(step.unit)}'
      + (f", {gone:,} turned away" if gone else "") + "</text>")
  return (f'<div class="card"><svg viewBox="0 0 {WIDE} {height}" role="img"><title>Funnel</title>{"".join(rows)}</svg>'
          "</div>")


def funnel_rows(steps: list[Step]) -> list[list[str]]:
  """The funnel as a table."""
  return [["stage", "in", "out", "why not"]] + [
    [step.stage, f"{step.entered:,}", f"{step.left:,} {step.unit}",
     ", ".join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in
               sorted(step.reasons.items(), key=lambda item: (-item[1], item[0]))) or "–"] for step in steps]


def table(rows: list[list[str]]) -> str:
  """A table; its last column holds words and may break."""
  def line(cells, tag):
    ends = [""] * (len(cells) - 1) + [' class="words"' if tag == "td" else ""]
    return "<tr>" + "".join(f"<{tag}{end}>{escape(cell)}</{tag}>"
                            for cell, end in zip(cells, ends, strict=True)) + "</tr>"
  return f'<div class="wide"><table>{line(rows[0], "th")}{"".join(line(row, "td") for row in rows[1:])}</table></div>'


def histogram(measure: Histogram) -> str:
  """Bars of what was kept, and above them of what was not; broken lines are the thresholds."""
  values = np.asarray(measure.kept + measure.lost, float)
  low, high = float(values.min()), float(values.max())
  # A handful of extreme values would press all others into one bar.
  shown = (low, high) if len(values) < 50 else tuple(float(v) for v in np.quantile(values, [.002, .998]))
  edges = np.linspace(*shown, BINS + 1) if shown[1] > shown[0] else np.linspace(low - .5, low + .5, BINS + 1)
  kept, lost = (np.histogram(np.clip(part, edges[0], edges[-1]), edges)[0] for part in (measure.kept, measure.lost))
  wide, tall, left, bottom = curve.WIDE, 180, 40, 24
  step, most = (wide - left - 10) / BINS, max(1, int((kept + lost).max()))
  out = [f'<svg viewBox="0 0 {wide} {tall}" role="img"><title>{escape(measure.name)}</title>']
  def x(value):
    return left + (value - edges[0]) / (edges[-1] - edges[0]) * (wide - left - 10)
  for value in curve.ticks(0.0, float(most), 3):
    y = tall - bottom - value / most * (tall - bottom - 10)
    out.append(f'<path class="grid" d="M{left} {y:.1f}H{wide - 10}"/>'
               f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
  for number in range(BINS):
    y = tall - bottom
    for word, count in (("kept", kept[number]), ("lost", lost[number])):
      length = count / most * (tall - bottom - 10)
      y -= length
      if count:
        out.append(f'<rect class="bar {word}" x="{left + number * step + .5:.1f}" y="{y:.1f}" '
                   f'width="{step - 1:.1f}" height="{length:.1f}"/>')
  for limit in measure.limits:
    if edges[0] <= limit <= edges[-1]:
      out.append(f'<path class="limit" d="M{x(limit):.1f} 6V{tall - bottom}"/>')
  out += [f'<text x="{x(value):.1f}" y="{tall - 6}" text-anchor="middle">{value:g}</text>'
          for value in curve.ticks(float(edges[0]), float(edges[-1]), 6)]
  return f'<div class="card"><h3>{escape(measure.name.replace("_", " "))}</h3>{"".join(out)}</svg></div>'


def figure(sample: Sample) -> str:
  """One clip: film, caption, tags, and why it was turned away."""
  shown = '<div class="none">no preview</div>'
  if sample.film:
    shown = (f'<video src="{escape(sample.film)}" poster="{escape(sample.poster)}" controls loop muted playsinline '
             'preload="none"></video>')
  tags = [f'<span class="tag">{escape(tag)}</span>' for tag in sample.tags]
  if sample.reason:
    tags.insert(0, f'<span class="tag out">{escape(sample.reason.replace("_", " "))}</span>')
  detail = f'<p class="soft">{escape(sample.detail)}</p>' if sample.detail else ""
  more = "".join(f'<span class="tag">{escape(tag)}</span>' for tag in sample.more)
  more = f"<details><summary>{len(sample.more)} more measures</summary>{more}</details>" if more else ""
  return (f'<figure>{shown}<figcaption>{escape(sample.caption)}{detail}</figcaption><div>{"".join(tags)}</div>{more}'
          f'<div class="id">{escape(sample.id)}</div></figure>')


def _section(title: str, body: str, note: str = "") -> list[str]:
  return [f"<h2>{escape(title)}</h2>", f'<p class="soft">{escape(note)}</p>' if note else "", body]


def render(report: Report) -> str:
  """The page as text."""
  facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
                  for name, value in report.facts.items())
  parts = [f"<h1>{escape(report.title)}</h1>", f"<dl>{facts}</dl>"]
  parts += _section("Funnel", funnel(report.funnel) + table(funnel_rows(report.funnel)),
                    "Of each stage, what went on (blue) and what was turned away (orange).")
  if report.kept:
    parts += _section("Kept", f'<div class="samples">{"".join(map(figure, report.kept))}</div>',
                      f"{len(report.kept)} of the clips, drawn by lot.")
  if report.rejected:
    parts += _section("Turned away", f'<div class="samples">{"".join(map(figure, report.rejected))}</div>',
                      f"{len(report.rejected)} shots, from every reason in turn.")
  if report.histograms:
    parts += _section("Measures", f'<div class="charts">{"".join(map(histogram, report.histograms))}</div>',
                      "Kept (blue) and turned away (orange); broken lines are the thresholds of the config.")
  for title, (lines, note) in report.charts.items():
    parts += _section(title, f'<div class="card">{curve.chart(title, lines)}</div>', note)
  for title, rows in report.tables.items():
    parts += _section(title, table(rows))
  return page.document(report.title, parts, STYLE)


def spread(groups: dict[str, list], most: int) -> list:
  """At most `most` items, from every group in turn."""
  turns = chain.from_iterable(zip_shortest(groups))
  return [item for item, _ in zip(turns, range(most), strict=False)]


def zip_shortest(groups: dict[str, list]) -> list[list]:
  """Lists of the first items of all groups, of the second ones, and so on."""
  longest = max(map(len, groups.values()), default=0)
  return [[group[number] for _, group in sorted(groups.items()) if number < len(group)] for number in range(longest)]
