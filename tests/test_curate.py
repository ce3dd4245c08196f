"""Curation from end to end: what comes out depends on films and settings, not on who works or what is killed."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import hostile
import numpy as np
import pytest
import tensorflow_datasets as tfds
import toons
from curation import child, pipeline, report, run, settings, sources

from anisora_jax.errors import BadInput
from anisora_jax.loaders import buckets, mixture, records, video
from anisora_jax.loaders.tfds import TfdsClips
from configs import curation

ROOT = Path(__file__).resolve().parents[1]
HEIGHT, WIDTH, FPS, SECONDS = 48, 64, 12, 7


def config(**changes):
  """The default config with other values, for films of thumbnails. changes: STAGE__FIELD=VALUE."""
  made = curation.get_config()
  for name, value in {"keep__rules": (), "pack__shard_megabytes": .01, "pack__held_out": .34, "report__kept": 3,
                      "report__rejected": 3, "measure__text_detector": "none", **changes}.items():
    stage, _, field = name.partition("__")
    made[stage][field] = value
  return settings.read(made)


def curate(films, out, workers=1, runner="FnApiRunner", options="", retry=False, **changes):
  run.curate(str(films), out, config(**changes), pipeline.Runner(runner, workers, options), retry)
  return out


def contents(out: Path) -> dict[str, str]:
  """sha256 of every file that a run ends with."""
  return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
          for path in sorted(out.rglob("*")) if path.is_file() and out / "work" not in path.parents}


def all_clips(folder):
  splits = [records.Records(folder, split) for split in records.SPLITS]
  return [split[number] for split in splits for number in range(len(split))]


def table(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def drawn():
  return [toons.draw_film(seed, seconds=SECONDS, height=HEIGHT, width=WIDTH, fps=FPS) for seed in range(3)]


@pytest.fixture(scope="module")
def films(drawn, tmp_path_factory):
  """Three films of two shots, the last again in a worse copy, and a text that is none."""
  folder = tmp_path_factory.mktemp("films")
  for number, film in enumerate(drawn):
    toons.write_film(folder, f"film-{number}", film)
  (folder / "copy.mp4").write_bytes(video.encode(drawn[2][0], float(FPS), crf=28))
  (folder / "text.mp4").write_text("no film")
  return folder


@pytest.fixture(scope="module")
def curated(films, tmp_path_factory):
  return curate(films, tmp_path_factory.mktemp("curated") / "out")


# what comes out

def test_every_shot_is_a_clip_once_with_its_pixels_caption_mask_and_licence(drawn, curated):
  clips = {clip.id: clip for clip in all_clips(curated)}
  assert len(clips) == sum(len(truth["shots"]) for _, _, truth in drawn)
  for number, (frames, masks, truth) in enumerate(drawn):
    for shot in truth["shots"]:
      clip = next(c for c in clips.values() if c.film == f"film-{number}.mp4" and
                  shot["start"] <= int(c.id.rpartition("/")[2]) < shot["end"])
      first = int(clip.id.rpartition("/")[2])
      assert first + clip.frames <= shot["end"] and clip.frames > .8 * (shot["end"] - shot["start"])
      assert clip.caption.startswith(shot["caption"]) and clip.licence == "CC0-1.0"
      seen, character = clip.look(np.arange(clip.frames), video.Size(HEIGHT, WIDTH))
      apart = (seen.astype(float) - frames[first:first + clip.frames]) @ [.299, .587, .114]
      assert 10 * np.log10(255**2 / (apart**2).mean()) > 33
      assert (character == masks[first:first + clip.frames]).all()


def test_the_index_the_table_and_the_checksums_say_what_lies_there(curated):
  index = records.read_index(curated)
  assert {row["name"] for rows in index["splits"].values() for row in rows} == \
    {path.name for path in curated.glob("*.arrayrecord")} and not list(curated.glob(".*"))
  assert any(len(rows) > 1 for rows in index["splits"].values())
  for row in [row for rows in index["splits"].values() for row in rows]:
    assert hashlib.sha256((curated / row["name"]).read_bytes()).hexdigest() == row["sha256"]
  ids = {split: [records.Records(curated, split)[n].id for n in range(records.count(curated, split))]
         for split in records.SPLITS}
  rows = table(curated / "clips.jsonl")
  assert [row["id"] for row in rows] == ids["train"] + ids["held_out"]
  for row in rows:
    shard, = (r for r in index["splits"][row["split"]] if r["name"] == row["shard"])
    assert 0 <= row["number"] < shard["records"] and row["licence"] == "CC0-1.0"
  assert {row["film"] for row in rows if row["split"] == "train"}.isdisjoint(
    row["film"] for row in rows if row["split"] == "held_out")


def test_what_is_turned_away_is_named_with_its_reason(curated):
  rejected = {(row["film"], row["stage"], row["reason"]) for row in table(curated / "rejected.jsonl")}
  assert ("text.mp4", "probe", "not_a_film") in rejected and ("copy.mp4", "deduplicate", "copy") in rejected
  for row in json.loads((curated / "index.json").read_text())["funnel"].values():
    assert row["in"] == row["out"] + sum(row["why"].values())


def test_tfds_reads_the_same_clips(curated):
  ours = {clip.id: clip for clip in all_clips(curated)}
  builder = tfds.builder_from_directory(str(curated / "tfds/clips/1.0.0"))
  theirs = [row for split in builder.info.splits for row in builder.as_data_source(split)]
  assert len(theirs) == len(ours)
  for row in theirs:
    clip = ours[row["id"].decode()]
    assert (row["mp4"], row["caption"].decode(), row["fps"]) == (clip.mp4, clip.caption, clip.fps)
  for split in records.SPLITS:
    source = TfdsClips(str(curated / "tfds/clips/1.0.0"), split)
    assert sorted(source[n].mp4 for n in range(len(source))) == \
      sorted(records.Records(curated, split)[n].mp4 for n in range(records.count(curated, split)))


# who works, what is killed, what is set

@pytest.mark.parametrize("workers", [2, 4])
def test_more_workers_give_the_same_bytes(films, curated, tmp_path, workers):
  assert contents(curate(films, tmp_path / "out", workers)) == contents(curated)


def start(films: Path, out: Path, *more: str) -> subprocess.Popen:
  """Curates as a user does, with the settings of `config`."""
  words = [sys.executable, "data/curate.py", "--films", films, "--out", out, "--workers=1", "--config.keep.rules=()",
           "--config.pack.shard_megabytes=.01", "--config.pack.held_out=.34", "--config.report.kept=3",
           "--config.report.rejected=3", "--config.measure.text_detector=none", *more]
  return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_kills_in_every_stage_change_nothing_and_no_work_is_done_twice(films, curated, tmp_path):
  """One folder is killed at the first file of each stage in turn, so every later run goes on where all before ended."""
  out = tmp_path / "out"
  work, done = out / "work", {}
  for pattern in ("probe/*.json", "cut/*.json", "measure/*.json", "prints/*.json", "describe/*.json", "clips/*/*.mp4",
                  "shards/*.json", "../report.html"):
    process = start(films, out)
    while process.poll() is None and not list(work.glob(pattern)):
      time.sleep(.005)
    started = child.below(process.pid)
    process.kill()
    process.communicate()
    assert list(work.glob(pattern)), pattern
    assert all(_ended(number) for number in started)
    held = {path: path.stat().st_mtime_ns for stage in ("probe", "cut", "measure", "prints", "clips")
            for path in (work / stage).rglob("[!.]*.*")}
    assert {path for path, changed in done.items() if held[path] != changed} == set()
    done = held
  assert start(films, out).wait() == 0
  assert contents(out) == contents(curated)
  assert all(path.stat().st_mtime_ns == changed for path, changed in done.items())


def _ended(process: int) -> bool:
  for _ in range(200):
    status = Path(f"/proc/{process}/stat")
    try:
      if status.read_text().rpartition(")")[2].split()[0] == "Z":
        return True
    except (FileNotFoundError, ProcessLookupError):
      return True
    time.sleep(.05)
  return False


def test_another_setting_redoes_only_what_depends_on_it(films, curated, tmp_path):
  out = curate(films, tmp_path / "out")
  before = {path: path.stat().st_mtime_ns for path in (out / "work").rglob("*.*")}
  strict = "long: sharpness <= 0.36"
  curate(films, out, keep__rules=(strict,), pack__shard_megabytes=1)
  kept = {clip.id for clip in all_clips(out)}
  assert 0 < len(kept) < len(all_clips(curated))
  for path, changed in before.items():
    if path.relative_to(out / "work").parts[0] in ("probe", "cut", "measure", "prints", "describe", "clips"):
      assert path.stat().st_mtime_ns == changed, path
  curate(films, out)
  assert contents(out) == contents(curated)
  curate(films, out, cut__longest=6.)
  assert all(path.stat().st_mtime_ns > changed for path, changed in before.items() if path.parent.name == "cut")
  assert all(path.stat().st_mtime_ns == changed for path, changed in before.items() if path.parent.name == "probe")


@pytest.mark.parametrize(("runner", "options"), [
  ("BundleBasedDirectRunner", ""), ("PortableRunner", "--job_endpoint=embed --environment_type=LOOPBACK")])
def test_another_runner_of_beam_gives_the_same_bytes(films, curated, tmp_path, runner, options):
  assert contents(curate(films, tmp_path / "out", 1, runner, options)) == contents(curated)


# what nobody means well

@pytest.fixture(scope="module")
def survived(tmp_path_factory):
  """(the expected ends, OUT) of the folder of hostile files, with a caption and a licence that are HTML."""
  folder = tmp_path_factory.mktemp("hostile")
  ends = hostile.folder(folder / "films")
  (folder / "films/deep.txt").write_text("</figcaption><script>alert(1)</script>\n\x00 \" onload=alert(2) '")
  words = {"licence": "<script>alert(3)</script>", "source": "\"><svg/onload=a>"}
  (folder / "films/hdr.json").write_text(json.dumps(words))
  (folder / "films/odd.json").write_text("{no json")
  return ends | {"odd.mkv": {"damaged_words"}}, curate(folder / "films", folder / "out", 2, cut__shortest=.5)


def test_every_hostile_file_ends_as_kept_or_with_a_reason(survived):
  ends, out = survived
  found: dict[str, set[str]] = {}
  for row in table(out / "rejected.jsonl"):
    found.setdefault(row["film"], set()).add(row["reason"])
  for row in table(out / "clips.jsonl"):
    found.setdefault(row["film"], set()).add("kept")
  assert set(found) == set(ends)
  for name, how in found.items():
    assert how & ends[name], (name, how)
  repairs = {row["film"]: set(row["repairs"]) for row in table(out / "clips.jsonl")}
  assert repairs["hdr.mp4"] == {"hdr"} and repairs["uneven.mp4"] == {"variable_rate"}
  assert repairs["rotated.mp4"] == {"rotated"}


def test_no_name_reaches_a_shell_or_leaves_the_folder(survived):
  ends, out = survived
  assert {path.name for path in out.parent.iterdir()} == {"films", "out"}
  assert not list(ROOT.glob("*escaped*")) and not list(Path.cwd().glob("*escaped*"))
  written = [path.relative_to(out).as_posix() for path in out.rglob("*")]
  assert all(re.fullmatch(r"[\w./-]+", name) for name in written)
  assert not any(Path(name).stem in path for name in ends for path in written if len(name) > 12)


class _Page(HTMLParser):
  """Collects tags, attributes and links of a page."""

  def __init__(self):
    super().__init__()
    self.tags, self.attributes, self.links, self.words = set(), set(), [], []

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self.attributes |= {name for name, _ in attrs}
    self.links += [value for name, value in attrs if name in ("src", "href", "poster")]

  def handle_data(self, data):
    self.words.append(data)


def test_the_report_runs_nothing_and_plays_what_lies_beside_it(survived):
  _, out = survived
  page, text = _Page(), (out / "report.html").read_text()
  page.feed(text)
  assert "script" not in page.tags and "img" not in page.tags and not any(a.startswith("on") for a in page.attributes)
  assert "default-src 'none'" in text and "<script" not in text
  assert len(page.links) >= 8 and all((out / link).is_file() and link.startswith("report/") for link in page.links)
  assert {path.relative_to(out).as_posix() for path in (out / "report").iterdir()} == set(page.links)
  said = " ".join(page.words)
  assert "not a film" in said and "copy" in said
  for link in page.links:
    if link.endswith(".mp4"):
      assert len(video.frames(out / link, [0])) == 1


def test_every_word_of_the_report_is_escaped():
  """Each text is a tag of its own name: one that is not escaped would be read as a tag."""
  def evil(name):
    return f"</p><evil-{name} onclick='a'>\"'"
  sample = report.Sample(evil("id"), evil("caption"), "a.mp4", "a.jpg", [evil("tag")], [evil("more")], evil("reason"),
                         evil("detail"))
  line = report.curve.Line(evil("line"), [0., 1.], [1., 2.])
  made = report.Report(evil("title"), {evil("fact"): evil("value")}, [report.Step(evil("stage"), evil("unit"), 2, 1, {
    evil("why"): 1})], [report.Histogram(evil("measure"), [1.], [2.], [1.5])], [sample], [sample],
    {evil("table"): [[evil("head"), "b"], [evil("cell"), evil("words")]]}, {evil("chart"): ([line], evil("note"))})
  page, text = _Page(), report.render(made)
  page.feed(text)
  assert not any(tag.startswith("evil") for tag in page.tags) and not any(a.startswith("on") for a in page.attributes)
  names = ["id", "caption", "tag", "more", "reason", "detail", "line", "title", "fact", "value", "stage", "unit", "why",
           "measure", "table", "head", "cell", "words", "chart", "note"]
  assert all(f"evil-{name}" in " ".join(page.words) for name in names)


def test_a_film_that_takes_too_long_is_turned_away_once_and_tried_again_when_asked(films, tmp_path):
  out = tmp_path / "out"
  with pytest.raises(BadInput, match="none of the 5 files gave a clip: probe: timed_out 5"):
    curate(films, out, limits__seconds=.001)
  verdicts = {path: path.stat().st_mtime_ns for path in (out / "work/lost").iterdir()}
  with pytest.raises(BadInput, match="timed_out"):
    curate(films, out, limits__seconds=.001)
  assert len(verdicts) == 5 and all(path.stat().st_mtime_ns == changed for path, changed in verdicts.items())
  with pytest.raises(BadInput, match="timed_out"):
    curate(films, out, limits__seconds=.001, retry=True)
  assert all(path.stat().st_mtime_ns > changed for path, changed in verdicts.items())


def test_captions_follow_the_shot_and_a_provider_that_failed_is_asked_again(films, tmp_path, capsys):
  answers, out = tmp_path / "answers", tmp_path / "out"
  program = (f"import os, sys; os.path.exists({str(answers)!r}) or sys.exit('no model here'); "
             "print('{\"caption\": \"A cat.\"}')")
  asked = {"describe__providers": ("command", "template"), "describe__command": (sys.executable, "-c", program),
           "describe__suffixes": (), "cut__shortest": 1.}

  def captions(**changes) -> dict[float, str]:
    curate(films / "film-0.mp4", out, **asked, **changes)
    return {round(clip.frames / clip.fps, 1): clip.caption for clip in all_clips(out)}

  for longest in (20., 2.1):
    made = captions(cut__longest=longest)
    assert all(f"a shot of {seconds} seconds" in caption.lower() for seconds, caption in made.items()), made
  assert "captions by template" in (said := capsys.readouterr().out) and "the same command asks it again" in said
  assert all("no model here" in row["facts"]["caption_failed"] for row in table(out / "clips.jsonl"))
  answers.touch()
  assert set(captions(cut__longest=2.1).values()) == {"A cat."}
  captions(cut__longest=2.1)
  assert "is complete already" in capsys.readouterr().out


def test_a_clip_that_crashes_is_turned_away_alone(films, curated, tmp_path):
  first = next(row["id"] for row in table(curated / "clips.jsonl") if row["film"] == "film-0.mp4")
  program = (f"import json, os, sys; {first!r} == json.load(sys.stdin)['id'] and os.kill(os.getppid(), 9); "
             "print('{\"caption\": \"A cat.\"}')")
  out = curate(films / "film-0.mp4", tmp_path / "out", describe__providers=("command",),
               describe__command=(sys.executable, "-c", program))
  lost = [(row["what"], row["reason"], row["detail"]) for row in table(out / "rejected.jsonl")]
  assert lost == [(first, "crashed", "the process that read it ended with SIGKILL")]
  assert {row["id"] for row in table(out / "clips.jsonl")} == {
    row["id"] for row in table(curated / "clips.jsonl") if row["film"] == "film-0.mp4"} - {first}


@pytest.mark.parametrize(("call", "reason", "detail"), [
  ((time.sleep, 60), "timed_out", "longer than 2 s"), ((os.abort,), "crashed", "SIGABRT"),
  ((os._exit, 3), "crashed", "status 3"), ((int, "x"), "failed", "ValueError"),
  ((bytearray, 10**12), "failed", "MemoryError"),
  ((os.system, "sleep 77 & sleep 77"), "timed_out", "2 s")])
def test_a_child_is_given_up_and_the_next_call_works(call, reason, detail):
  kept = child.Child(child.Limits(2. if reason == "timed_out" else 60., 4.))
  before = kept.call(os.getpid)
  with pytest.raises(child.Lost) as lost:
    kept.call(*call)
  assert lost.value.args[0] == reason and detail in lost.value.args[1]
  assert kept.call(os.getpid) != os.getpid() and (reason == "failed") == (kept.call(os.getpid) == before)
  kept.close()
  for path in Path("/proc").glob("[0-9]*/cmdline"):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # others end meanwhile
      assert b"sleep\0" + b"77" not in path.read_bytes()


def test_a_film_has_its_seconds_after_a_slow_start_and_is_lost_when_none_starts(tmp_path, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  start, slow = tmp_path / "sitecustomize.py", child.Child(child.Limits(2., 4.))
  start.write_text("import time; time.sleep(3)")
  assert slow.call(os.getpid) != os.getpid()
  slow.close()
  start.write_text("import os; os._exit(3)")
  with pytest.raises(child.Lost) as lost:
    slow.call(os.getpid)
  assert lost.value.args == ("crashed", "the process that read it ended with status 3")


# how it is asked

@pytest.mark.parametrize(("words", "said"), [
  (("--films=nowhere",), "--films nowhere is not there: give a folder of films, a film, or a pattern"),
  (("--films={films}", "--config.cut.longset=3"), "no config field is named .*longset"),
  (("--films={films}", "--config.cut.shortest=-1"), "cut.shortest is -1.0: allowed are"),
  (("--films={films}", "--config=nowhere.py"), "config file nowhere.py cannot be read"),
  (("--films={films}", "--flims=x"), "no flag is named --flims: did you mean 'films'")])
def test_wrong_input_is_told_in_one_line(films, tmp_path, words, said):
  words = [word.replace("{films}", str(films)) for word in words]
  done = subprocess.run([sys.executable, "data/curate.py", f"--out={tmp_path}/out", *words], cwd=ROOT,
                        capture_output=True, text=True)
  assert done.returncode == 2 and re.search(said, done.stderr), done.stderr
  assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


@pytest.mark.parametrize(("made", "said"), [
  (lambda folder: config(keep__rules=("beauty >= 3",)), "nothing measures 'beauty'"),
  (lambda folder: config(limits__seconds=0.), "seconds must be above 0"),
  (lambda folder: config(pack__held_out=1.), "pack.held_out is 1.0: allowed are 0 to 0.9"),
  (lambda folder: config(clip__height=33), "clip.height is 33: H.264 in yuv420p needs an even number"),
  (lambda folder: config(report__rows=1), "report.rows is 1: allowed are 16 to 1080"),
  (lambda folder: pipeline.Runner(workers=0), "--workers is 0: at least one"),
  (lambda folder: pipeline.Runner("Flunk"), "--runner Flunk"),
  (lambda folder: pipeline.Runner("no.such.Runner"), r"--runner no\.such\.Runner cannot be used"),
  (lambda folder: pipeline.Runner(options="'"), "--beam_options ' cannot be used"),
  (lambda folder: sources.find(str(folder), folder / "out"), "no films in .*: 0 files are there, none ends in ")])
def test_wrong_settings_are_told_in_one_line(tmp_path, made, said):
  with pytest.raises(BadInput, match=said) as mistake:
    made(tmp_path)
  assert "\n" not in str(mistake.value)


def test_two_runs_do_not_share_a_folder(films, curated):
  with run._alone(curated / "work"), pytest.raises(BadInput, match=r"another run works in .*: wait for it"):
    curate(films, curated)


def test_every_setting_of_the_config_is_that_of_its_stage():
  made = curation.get_config()
  assert set(made) == set(settings.FILM | settings.ALL)
  for stage, kind in (settings.FILM | settings.ALL).items():
    assert set(made[stage]) == set(kind.__dataclass_fields__), stage
  assert settings.read(made).keep.parsed


def test_patterns_find_the_films_they_name(films):
  def names(pattern):
    return [source.name for source in sources.find(str(films / pattern), films / "out")]
  assert names("*.mp4") == ["copy.mp4", "film-0.mp4", "film-1.mp4", "film-2.mp4", "text.mp4"] == names("")
  assert names("film-[01]*4") == ["film-0.mp4", "film-1.mp4"] and names("copy.mp4") == ["copy.mp4"]
  assert len({source.key for source in sources.find(str(films), films)}) == 5


@pytest.mark.parametrize("place", ["{0}", "tfds:{0}/tfds/clips/1.0.0"])
def test_the_loader_makes_batches_of_what_came_out(curated, place):
  bucket = buckets.Bucket(9, 16, 24, 2)
  batches = mixture.Batches([mixture.Source(place.format(curated))], [bucket], fps=12, threads=0)
  batch = next(batches)
  assert batch["frames"].shape == (2, 9, 16, 24, 3) and all(caption for caption in batch["caption"])


def test_the_records_train(curated, tmp_path):
  words = [sys.executable, "-m", "anisora_jax.train", "--config=configs/tiny.py", f"--config.data.records={curated}",
           "--config.data.buckets=5x16x24@8", "--config.train.steps=2", "--config.train.held_out=0",
           "--config.optimizer.warmup=1", f"--workdir={tmp_path / 'run'}"]
  there = {**os.environ, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(words, cwd=ROOT, env=there, capture_output=True, text=True)
  assert done.returncode == 0 and "trained 2 steps" in done.stdout, done.stderr[-2000:]
