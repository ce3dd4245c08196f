"""report.html: what was trained, how it went, the numbers, and every sample beside its sheet.

One file that opens from a disk without a server or a script; pictures and films are links relative to it.
"""

import base64
import hashlib
import math
import os
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from urllib.parse import quote

from anisora_jax.errors import BadInput
from anisora_jax.evaluation.curve import Line, chart, series, smooth

STYLE = """
:root { color-scheme: light dark; --paper: #faf9f6; --card: #fff; --ink: #222226; --soft: #6f6d67; --rule: #e3e1da;
  --c0: #d9480f; --c1: #1c7ed6; --c2: #2b8a3e; --c3: #9c36b5; --c4: #b08900; --c5: #0b7285; }
@media (prefers-color-scheme: dark) { :root { --paper: #17171a; --card: #1f1f23; --ink: #ececee; --soft: #a09e98;
  --rule: #35353b; --c0: #ff8a4c; --c1: #5cb0ff; --c2: #69d27f; --c3: #dc8bf0; --c4: #e5c04b; --c5: #4fc3d6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.5rem 5rem; max-width: 78rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 1.5rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 1rem; }
h3 { font-size: 1rem; margin: 0; }
p { margin: .25rem 0; } .soft { color: var(--soft); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem 2rem; margin: 0; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1.5rem; }
.card, figure { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 1rem; margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); fill: none; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
polyline.faint { stroke-width: 1; opacity: .3; } svg text.name { font-weight: 600; }
polyline.line0 { stroke: var(--c0); } polyline.line1 { stroke: var(--c1); } polyline.line2 { stroke: var(--c2); }
polyline.line3 { stroke: var(--c3); } polyline.line4 { stroke: var(--c4); } polyline.line5 { stroke: var(--c5); }
text.line0 { fill: var(--c0); } text.line1 { fill: var(--c1); } text.line2 { fill: var(--c2); }
text.line3 { fill: var(--c3); } text.line4 { fill: var(--c4); } text.line5 { fill: var(--c5); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; min-width: 30rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem 1.4rem .45rem 0; text-align: right; border-bottom: 1px solid var(--rule); }
th, td { white-space: nowrap; }
th { font-weight: 600; font-size: .85rem; color: var(--soft); } td:first-child, th:first-child { text-align: left; }
td.best { font-weight: 700; color: var(--c2); }
figure { margin-bottom: 1.5rem; } figcaption { margin-bottom: .75rem; overflow-wrap: anywhere; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
video, img.film { display: block; width: min(100%, 24rem); border-radius: 6px; margin-top: .75rem; }
video, img.film { image-rendering: pixelated; }
a { color: var(--c1); }
"""


@dataclass(frozen=True)
class Score:
  """One line of the table: mean PSNR in dB over held-out clips. baselines: name -> the same for making nothing."""

  task: str
  clips: int
  model: float
  baselines: dict[str, float]


@dataclass(frozen=True)
class Exhibit:
  """One sample and its files. note: anything to say of it, such as its PSNR."""

  task: str
  caption: str
  sheet: Path
  film: Path | None = None
  gif: Path | None = None
  note: str = ""


@dataclass(frozen=True)
class Report:
  """What the page says. facts: name -> value, in order. measures: one dict a reported step, with "step"."""

  title: str
  facts: dict[str, str] = field(default_factory=dict)
  measures: list[dict] = field(default_factory=list)
  scores: list[Score] = field(default_factory=list)
  exhibits: list[Exhibit] = field(default_factory=list)


def curves(measures: list[dict], held_out: str = "held_out") -> str:
  """Training loss, raw and smoothed, and every measure whose name begins with `held_out`, one line each."""
  steps, losses = series(measures, "loss")
  mean = smooth(losses, max(1, len(losses) // 25))
  training = [Line("each", steps, losses, faint=True), Line("loss", steps, mean)]
  names = sorted({name for row in measures for name in row if name.startswith(held_out)})
  bins = [Line(name.removeprefix(held_out).strip("/_ ") or "all", *series(measures, name), number)
          for number, name in enumerate(names)]
  cells = [("Training loss", training), ("Held-out loss by noise time", bins)]
  return '<div class="charts">' + "".join(
    f'<div class="card"><h3>{title}</h3>{chart(title, lines)}<p class="soft">over training steps</p></div>'
    for title, lines in cells) + "</div>"


def _decibel(value: float | None) -> str:
  if value is None or math.isnan(value):
    return "–"
  return "∞" if math.isinf(value) else f"{value:.2f}"


def table(scores: list[Score]) -> str:
  """A line a task: clips, the model, every baseline, and what the model gains over the best of them."""
  names = list(dict.fromkeys(name for score in scores for name in score.baselines))
  head = ["task", "clips", "model", *names, "gain"]
  out = ["<tr>" + "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in head) + "</tr>"]
  for score in scores:
    gain = score.model - max(score.baselines.values()) if score.baselines else None
    cells = [escape(score.task.replace("_", " ")), str(score.clips), _decibel(score.model),
             *[_decibel(score.baselines.get(name)) for name in names]]
    last = "–" if gain is None else f"{gain:+.2f}"
    best = ' class="best"' if gain is not None and gain > 0 else ""
    out.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + f"<td{best}>{last}</td></tr>")
  return f'<div class="wide"><table>{"".join(out)}</table></div><p class="soft">Mean PSNR in dB; higher is nearer.</p>'


def _link(file: Path, folder: Path) -> str:
  """A link that works from the page's folder; every character that could end or change it is encoded."""
  return escape(quote(Path(os.path.relpath(file, folder)).as_posix()))


def figure(exhibit: Exhibit, folder: Path) -> str:
  """One sample: sheet, film and gif."""
  note = f'<p class="soft">{escape(exhibit.note)}</p>' if exhibit.note else ""
  sheet = _link(exhibit.sheet, folder)
  out = [f"<figure><figcaption><h3>{escape(exhibit.task.replace('_', ' '))}</h3><p>{escape(exhibit.caption)}</p>"
         f'{note}</figcaption><a href="{sheet}"><img src="{sheet}" alt="contact sheet" loading="lazy"></a>']
  if exhibit.film:
    film = _link(exhibit.film, folder)
    out.append(f'<video src="{film}" controls loop autoplay muted playsinline></video>')
    links = f'<a href="{film}">mp4</a>'
    links += f' · <a href="{_link(exhibit.gif, folder)}">gif</a>' if exhibit.gif else ""
    out.append(f"<p>{links}</p>")
  elif exhibit.gif:
    out.append(f'<img class="film" src="{_link(exhibit.gif, folder)}" alt="film">')
  return "".join([*out, "</figure>"])


def document(title: str, parts: list[str], style: str = STYLE) -> str:
  """A page of `parts`, which are HTML already; no script can run in it (Content-Security-Policy)."""
  digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
  policy = (f"default-src 'none'; style-src 'sha256-{digest}'; img-src 'self' file:; media-src 'self' file:; "
            "base-uri 'none'; form-action 'none'")
  return (f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
          f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
          f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
          f"<style>{style}</style></head><body>{''.join(parts)}</body></html>\n")


def render(report: Report, folder: Path) -> str:
  """The page as text, for a file in `folder`. All text is escaped."""
  facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
                  for name, value in report.facts.items())
  parts = [f"<h1>{escape(report.title)}</h1>", f"<dl>{facts}</dl>" if facts else ""]
  if report.measures:
    parts += ["<h2>Training</h2>", curves(report.measures)]
  if report.scores:
    parts += ["<h2>Numbers</h2>", table(report.scores)]
  if report.exhibits:
    parts += ["<h2>Samples</h2>", *(figure(exhibit, folder) for exhibit in report.exhibits)]
  return document(report.title, parts)


def write_page(path: str | Path, report: Report) -> None:
  """Writes the page whole or not at all. Raises BadInput where the folder or the disk refuses."""
  path = Path(path)
  aside = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text(render(report, path.parent), encoding="utf-8")
    os.replace(aside, path)
  except OSError as error:
    if path.parent.is_dir():
      aside.unlink(missing_ok=True)
    raise BadInput(f"cannot write {path}: {error.strerror}; give a folder with space that you may write to.") from error
