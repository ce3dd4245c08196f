"""Any prepared tensorflow_datasets video dataset as a source of clips, without TensorFlow.

"tfds:NAME[/CONFIG][:SPLIT[:HELD_OUT]]" is looked for in $TFDS_DATA_DIR (~/tensorflow_datasets), "tfds:/FOLDER..." is
the folder that holds dataset_info.json. SPLIT may be a slice: "tfds:ucf101:train[:90%]:train[90%:]". The dataset must
be stored as ArrayRecord, the format of TFDS with random access, and have a Video feature or bytes of a film file.

A Video feature is stored as a sequence of images, but its class cannot be made without TensorFlow. So the features are
read from features.json with every Video written as the sequence of images that it is.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jaxtyping import Bool, Int
from tensorflow_datasets.core import dataset_info, file_adapters

from anisora_jax.errors import BadInput
from anisora_jax.loaders import records, video

PREFIX = "tfds:"
_HELD_OUT = ("validation", "valid", "test")
_CAPTIONS = ("caption", "text", "description", "label")
_SCOPE = "tensorflow_datasets.core.features."


@dataclass(frozen=True)
class Pixels:
  """A clip that is stored as pictures; without a rate of its own it plays at the rate that is asked for."""
  id: str
  caption: str
  fps: float | None
  pictures: Sequence[np.ndarray]

  @property
  def frames(self) -> int:
    return len(self.pictures)

  def look(self, indices: Int[np.ndarray, "F"], size: video.Size) -> tuple[video.Frames, Bool[np.ndarray, "F H W"]]:
    """Chosen frames, scaled and cropped to `size`; no character is tracked. Raises video.Unreadable."""
    chosen = [np.asarray(self.pictures[i]) for i in indices]
    if any(picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] not in (1, 3) for picture in chosen):
      raise video.Unreadable(f"pictures are {chosen[0].dtype} {chosen[0].shape}, not uint8 [H, W, 1 or 3]")
    frames = np.stack([video.fit(np.broadcast_to(picture, (*picture.shape[:2], 3)), size) for picture in chosen])
    return frames, np.zeros(frames.shape[:3], bool)


def images_for_videos(feature: Any) -> Any:
  """features.json with every Video feature written as the Sequence of Images it is stored as."""
  if not isinstance(feature, dict):
    return feature
  if "video" not in feature or not str(feature.get("pythonClassName", "")).endswith("video_feature.Video"):
    return {key: images_for_videos(value) for key, value in feature.items()}
  stored = feature["video"]
  length, *picture = stored.get("shape", {}).get("dimensions", ["-1", "-1", "-1", "3"])
  image = {"shape": {"dimensions": picture}, "dtype": stored.get("dtype", "uint8"),
           "encodingFormat": stored.get("encodingFormat", "png")}
  pictures = {"pythonClassName": _SCOPE + "image_feature.Image", "image": image}
  return {"pythonClassName": _SCOPE + "sequence_feature.Sequence", "sequence": {"feature": pictures, "length": length}}


def find(name: str) -> Path:
  """The folder of a prepared dataset: a folder as it is, or the newest version of NAME or NAME/CONFIG."""
  folder = Path(name).expanduser()
  if not folder.is_absolute():
    folder = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser() / name
  if (folder / "dataset_info.json").is_file():
    return folder
  versions = [path for path in folder.glob("*.*.*") if (path / "dataset_info.json").is_file()]
  if not versions:
    configs = sorted(path.parent.parent.name for path in folder.glob("*/*.*.*/dataset_info.json"))
    known = f"; it has the configs {', '.join(configs)}" if configs else ""
    raise BadInput(f"no prepared dataset in {folder}{known}: set TFDS_DATA_DIR, or give the folder as tfds:/FOLDER, "
                   "or make it with: tfds build NAME --file_format=array_record")
  return max(versions, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])


class TfdsClips:
  """One split of a prepared dataset, by number: `clips[i]` is a records.Clip or Pixels.

  spec: what follows "tfds:". split: "train" or "held_out". Raises BadInput, also records.Empty; `clips[i]` raises
  video.Unreadable.
  """
  seconds = None  # clips differ in length; too short ones are found when they are read

  def __init__(self, spec: str, split: str):
    name, *chosen = re.split(r":(?![^\[]*\])", spec)
    self.name, folder = PREFIX + spec, find(name)
    about = dataset_info.read_proto_from_builder_dir(folder)
    if about.file_format != "array_record":
      raise BadInput(f"{folder} is stored as {about.file_format or 'tfrecord'}: only array_record can be read in any "
                     "order; convert it with: tfds convert_format --dataset_dir=... --out_file_format=array_record")
    if not (folder / "features.json").is_file():
      raise BadInput(f"{folder} has no features.json, so an old tensorflow_datasets made it: make it again.")
    splits = dataset_info.get_split_dict_from_proto(about, folder, file_adapters.FileFormat.ARRAY_RECORD)
    wanted = _split_of(split, chosen, list(splits), self.name)
    try:
      files = splits[wanted].file_instructions
    except (KeyError, ValueError) as error:
      raise BadInput(f"{self.name} has no split {wanted!r}: allowed are {', '.join(splits)} and slices of "
                     "them.") from error
    self._source = ArrayRecordDataSource(files)
    self._features = tfds.features.FeaturesDict.from_json(
      images_for_videos(json.loads((folder / "features.json").read_text())))
    self._features.load_metadata(folder, feature_name=None)  # the names of class labels
    self._film, self._caption = _film_of(self._features, self.name), _first(self._features, _CAPTIONS)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, number: int) -> records.Clip | Pixels:
    name = f"{self.name}/{number}"
    try:
      example = self._features.deserialize_example_np(self._source[int(number)])
    except Exception as error:  # whatever the decoders of a foreign dataset raise, this record is not readable
      raise video.Unreadable(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    film, caption = example[self._film], self._words(example)
    if not isinstance(film, bytes):
      fps = float(example["fps"]) if "fps" in example else None
      return Pixels(name, caption, fps, film)
    facts = video.facts(film)
    return records.Clip(id=name, film=name, source=self.name, licence="", caption=caption, **facts._asdict(),
                        motion=None, mp4=film, character=None)

  def _words(self, example: dict) -> str:
    if self._caption is None:
      return ""
    value, feature = example[self._caption], self._features[self._caption]
    if isinstance(feature, tfds.features.ClassLabel):
      return feature.int2str(int(value))
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _first(features: tfds.features.FeaturesDict, names: Sequence[str]) -> str | None:
  return next((name for name in names if name in features), None)


def _split_of(split: str, chosen: list[str], there: list[str], name: str) -> str:
  """The dataset's word for our split."""
  if split == "train":
    return chosen[0] if chosen else "train"
  found = chosen[1] if len(chosen) > 1 else next((word for word in _HELD_OUT if word in there), None)
  if found is None:
    raise records.Empty(f"{name} does not say which split is held out, and it has only {', '.join(there)}: "
                        "write for example tfds:NAME:train[:90%]:train[90%:]")
  return found


def _film_of(features: tfds.features.FeaturesDict, name: str) -> str:
  """The feature that holds the film: a sequence of images, or bytes named mp4, film or video."""
  for key, feature in features.items():
    if isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.Image):
      return key
  found = _first(features, ("mp4", "film", "video"))
  if found is None:
    raise BadInput(f"{name} has no video feature and no bytes named mp4, film or video; it has {', '.join(features)}.")
  return found
