"""What curation keeps and how: every setting of every stage, with its unit and the reason for its value.

  python data/curate.py --films FILMS --out out/curated --config configs/curation.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.limits = ConfigDict({  # of the process that reads films
    "seconds": 86400.0,       # a film that is analysed longer, or a clip made longer, is turned away: two hours of
                              # noisy 1080p take a core eight
    "gigabytes": 16.0,        # of address space, so that no film takes the machine's memory; 0: no limit
  })
  config.probe = ConfigDict({
    "smallest": 32,           # pixels of the shorter side; below it nothing can be seen
    "largest": 8192,          # pixels of the longer side
    "slowest": 4.0,           # pictures a second; slower is a slide show
    "fastest": 60.0,          # pictures a second; of faster films every second, third, ... picture is shown
    "narrowest": 4.0,         # longest ratio of the sides
  })
  config.cut = ConfigDict({
    "shortest": 2.0,          # seconds of a shot; less holds little motion to learn
    "longest": 20.0,          # seconds; longer shots are divided evenly
    "content": 20.0,          # change of hue, saturation and value, 0 to 255, from which a cut is suspected
    "adaptive": 2.0,          # the same in multiples of the change around it
    "still": 0.5,             # seconds without change from which the ends of a shot are trimmed
    "freeze": 1.5,            # and from which a shot is divided; drawings held on threes last a quarter of a second
    "black": 14.0,            # brightness, 0 to 255, up to which a border is black
  })
  config.measure = ConfigDict({
    "height": 480,            # rows at which text and looks are measured
    "still": 0.02,            # widths of the picture a second below which the camera stands
    "text_detector": "ppocr", # of text on the picture, its weights come with the package; "none" leaves it unmeasured
    "text_seconds": 3.0,      # between looks for text; subtitles stay about as long
    # Your own models, as {"name": "taste", "command": ("python", "taste.py"), "scores": {"aesthetic": (0, 10)},
    # "words": ("tags",)}; see Command in data/curation/measure.py. A score that nobody gives is absent.
    "providers": (),
  })
  config.keep = ConfigDict({  # data/curation/keep.py says how rules are written; the first that is broken is the reason
    "rules": (
      "too still: motion_per_second >= 0.005",  # widths a second: below it only mouths and eyes move
      "too wild: motion_per_second <= 2.0",     # flicker and noise, which no flow follows
      "too much text: text_area <= 0.05 or absent",  # share of the picture: credits and title cards; subtitles take 2 %
      "blank: 0.03 <= brightness <= 0.97",
      "blank: contrast >= 0.02",
    ),
  })
  config.budget = ConfigDict({  # how many of the ranked clips, and how often
    "passes": 0,              # samples that training will see, batch size times steps; 0 keeps every clip
    "rank": (("sharpness", 1.0), ("motion", 0.5)),  # measures and weights that rank clips; below 0: less is better
    "points": (),             # (low, high, passes, loss) of trainings you measured; without them the published law:
    "utility": 0.178,         # of the best clip; this and the rest were fitted to image-text pairs, see data/curation/
    "fall": 2.1,              # budget.py; how fast utility falls with rank
    "half_life": 6.0,         # repetitions of the best tenth after which a clip teaches half
    "unit": 0.03,             # passes, as a share of the clips, before which little is learned
  })
  config.describe = ConfigDict({
    "providers": ("sidecar", "template"),  # of captions, tried in this order; also command and endpoint
    "longest": 2000,          # letters of a caption; umT5 reads 512 tokens
    "suffixes": ("aesthetic", "motion", "camera", "no_text"),  # AniSora's scores, written where they were measured
    "motion_scale": 10.0,     # motion score per width of the picture a second; AniSora never said its own
    "no_text": 0.0,           # share of the picture that text takes at most where the caption says that there is none
    "command": (),            # of provider command: program and arguments; JSON in, {"caption": ...} out
    "seconds": 120.0,         # for one answer of the command or of the endpoint
    "pictures": 8,            # key frames of a clip that are shown, at most
    "side": 512,              # pixels of their longer side
    "change": 0.05,           # mean change of grey, 0 to 1, that is worth another key frame
    "url": "http://127.0.0.1:8000/v1",  # of provider endpoint, OpenAI-compatible: vLLM, SGLang, llama.cpp
    "model": "",              # as the server names it
    "key_variable": "",       # environment variable that holds its key
    "tries": 3,               # of one call
    "pause": 1.0,             # seconds before the second try, doubled at each further one
    "tokens": 400,            # of an answer
  })
  config.clip = ConfigDict({    # how a chosen shot is encoded
    "height": 0,              # rows of pixels; 0 keeps the shot's shape, and with width 0 its size
    "width": 0,               # columns of pixels
    "crf": 15,                # quality of H.264: 0 is lossless, 15 looks it, 23 is small
  })
  config.pack = ConfigDict({
    "held_out": 0.1,          # share of the films, those that share a clip together, that is never trained on
    "shard_megabytes": 256.0, # of one file of records: some hundred clips
    "tfds": True,             # also as a dataset of tensorflow_datasets, which takes the same space again
    "source": "",             # where films come from that do not say in a NAME.json beside them
    "licence": "unknown",     # of films that do not say
  })
  config.report = ConfigDict({
    "kept": 24,               # clips shown
    "rejected": 24,           # shots shown that were turned away
    "rows": 180,              # of preview films, pixels
    "seconds": 4.0,           # of a preview at most
  })
  return config
