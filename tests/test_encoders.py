"""The text and image encoders equal transformers', whatever the padding, the mesh and the file they come from."""

import html
import json
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import AutoTokenizer, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from anisora_jax.errors import BadInput
from anisora_jax.models import names
from anisora_jax.models.wan import encoder_names, text, tokenizer
from anisora_jax.models.wan.encoder_placement import TEXT_RULES
from anisora_jax.parallel import mesh, placement

TEXT = text.TextSize(layers=3, width=24, heads=4, head_width=10, mlp=40, vocabulary=150)
CLOSE = 1e-5  # sums in another order differ by some f32 roundings of the largest number


def apart(ours, theirs) -> float:
  """The largest difference, relative to the largest number."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  assert ours.shape == theirs.shape
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


def randomised(model: torch.nn.Module) -> torch.nn.Module:
  """A witness in which no parameter has kept its start: no zeros, no ones."""
  draw = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(torch.randn(p.shape, generator=draw) * (p[0].numel() ** -0.5 if p.ndim in (2, 4) else 0.3))
  return model.eval()


def text_witness(size: text.TextSize) -> UMT5EncoderModel:
  return UMT5EncoderModel(UMT5Config(
    vocab_size=size.vocabulary, d_model=size.width, d_kv=size.head_width, d_ff=size.mlp, num_layers=size.layers,
    num_heads=size.heads, relative_attention_num_buckets=size.buckets, relative_attention_max_distance=size.far))


def tensors(model: torch.nn.Module, start: str = "") -> dict[str, np.ndarray]:
  return {start + name: p.numpy() for name, p in model.state_dict().items() if name not in encoder_names.COPIES}


@pytest.fixture(scope="module")
def text_model() -> tuple[UMT5EncoderModel, dict]:
  model = randomised(text_witness(TEXT))
  with torch.no_grad():  # large enough that a bias of the wrong distance or layer is seen
    for block in model.encoder.block:
      block.layer[0].SelfAttention.relative_attention_bias.weight.mul_(2)
  return model, names.from_torch(tensors(model), encoder_names.text_entries(TEXT, "huggingface"))


def captions(s: int, *lengths: int) -> tuple[np.ndarray, np.ndarray]:
  """Random ids `[b, s]` of captions of these lengths; behind them stands noise, which a mask must hide."""
  ids = np.random.default_rng(s).integers(0, TEXT.vocabulary, (len(lengths), s), dtype=np.int32)
  return ids, np.arange(s) < np.array(lengths)[:, None]


def text_judge(model, ids, mask) -> np.ndarray:
  with torch.no_grad():
    out = model(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.numpy()
  return np.where(mask[..., None], out, 0)  # Wan keeps the real rows and fills with zeros


def single() -> jax.sharding.Mesh:
  return mesh.build(count=1)


@pytest.mark.parametrize(("s", "lengths"), [(1, (1,)), (7, (7, 1)), (37, (5, 37)), (301, (300, 143)), (512, (512, 77))])
def test_text_tokens_equal_transformers(text_model, s, lengths):
  model, params = text_model
  ids, mask = captions(s, *lengths)
  ours = text.encode(text.UMT5(TEXT, single()), params, ids, mask)
  assert apart(ours, text_judge(model, ids, mask)) < CLOSE


def test_distances_fall_into_the_buckets_of_transformers():
  for buckets, far in ((32, 128), (16, 50), (64, 300)):
    witness = text_witness(replace(TEXT, buckets=buckets, far=far)).encoder.block[0].layer[0].SelfAttention
    distance = torch.arange(512)[None] - torch.arange(512)[:, None]
    assert np.array_equal(text.distance_buckets(512, buckets, far), witness._relative_position_bucket(distance))


def test_padding_never_reaches_a_caption(text_model):
  """The same caption alone, and before padding of any length and content."""
  network = text.UMT5(TEXT, single())
  ids, mask = captions(64, 9)
  alone = text.encode(network, text_model[1], ids[:, :9], mask[:, :9])
  padded = text.encode(network, text_model[1], ids, mask)
  assert apart(padded[:, :9], alone) < CLOSE and not np.any(padded[:, 9:])


def test_bf16_text_stays_close(text_model):
  model, params = text_model
  ids, mask = captions(37, 37, 5)
  half = jax.tree.map(partial(jnp.asarray, dtype=jnp.bfloat16), params)
  for weights in (params, half):
    ours = text.encode(text.UMT5(TEXT, single(), jnp.bfloat16), weights, ids, mask)
    # bf16 keeps 8 bits: weights and each of some ten products in a row are off by up to 2^-9 of their number.
    assert ours.dtype == jnp.float32 and 1e-4 < apart(ours, text_judge(model, ids, mask)) < 2e-2


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "seq": 2}])
def test_text_is_the_same_on_every_mesh(text_model, sizes):
  eight = mesh.build(sizes)
  network = text.UMT5(TEXT, eight)
  placed = placement.shardings(TEXT_RULES, text.abstract_params(network), eight)
  ids, mask = captions(37, 5, 37, 1, 20)
  ours = text.encode(network, jax.device_put(text_model[1], placed), ids, mask)
  assert apart(ours, text.encode(text.UMT5(TEXT, single()), text_model[1], ids, mask)) < CLOSE


def test_the_embedding_of_the_vocabulary_stays_in_shares():
  eight = mesh.build({"data": 2, "fsdp": 2, "tensor": 2})
  network = text.UMT5(TEXT, eight)
  shapes = text.abstract_params(network)
  params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes,
                        placement.shardings(TEXT_RULES, shapes, eight))
  split = jax.NamedSharding(eight, jax.P(mesh.BATCH))
  told = (jax.ShapeDtypeStruct((4, 37), dtype, sharding=split) for dtype in (jnp.int32, jnp.bool_))
  compiled = text.encode.lower(network, params, *told).compile().as_text()
  sides = {int(side) for side in re.findall(r"f32\[150,(\d+)\]", compiled)}
  assert sides == {TEXT.width // 4}


SENTENCES = ["A girl in a red coat runs over the bridge.", "The camera follows the cat, slowly.",
             "色调艳丽，过曝，静态", "雨の夜、少女が走る。", "Tom & Jerry dance at 24 fps <in> the rain!",
             "it's a \"quoted\" film"]
CAPTIONS = ["", "A cat", "  the \t camera\n\n follows\u3000 Tom &amp;amp; Jerry ", "schÃ¶n, dâ€™accord",
            "色调艳丽 unseen ☃ 雨", " ".join(SENTENCES * 3), "a</s>b <pad> c", "a < b &amp;lt; c"]
NORMALISED = "the film… №1"  # needs the file's normaliser, which transformers 5 leaves out of a T5Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tokenizer of the published kind, learnt from a few sentences: unigrams, T5's special tokens, an end."""
  learnt = tokenizers.Tokenizer(tokenizers.models.Unigram())
  learnt.normalizer = tokenizers.normalizers.NFKC()
  learnt.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace()])
  learnt.train_from_iterator(SENTENCES, tokenizers.trainers.UnigramTrainer(
    vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
  learnt.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
  path = tmp_path_factory.mktemp("umt5-xxl")
  learnt.save(str(path / "tokenizer.json"))
  (path / "tokenizer_config.json").write_text(json.dumps({
    "tokenizer_class": "T5Tokenizer", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}))
  return path


def tokenise(folder, captions, length, reader=AutoTokenizer):
  """What upstream makes of captions."""
  return reader.from_pretrained(folder)(
    [prompt_clean(caption) for caption in captions], padding="max_length", max_length=length, truncation=True,
    add_special_tokens=True, return_attention_mask=True, return_tensors="np")


@pytest.mark.parametrize(("reader", "told"), [(AutoTokenizer, CAPTIONS),
                                              (PreTrainedTokenizerFast, [*CAPTIONS, NORMALISED])])
@pytest.mark.parametrize("length", [512, 13, 1])
def test_ids_and_mask_equal_transformers(folder, length, reader, told):
  theirs = tokenise(folder, told, length, reader)
  ids, mask = tokenizer.read(str(folder), length, 150)(told)
  assert np.array_equal(ids, theirs["input_ids"]) and np.array_equal(mask, theirs["attention_mask"])
  assert len(set(mask.sum(1))) > 3 or length < 13
  assert np.array_equal(ids[0][:1], [1]) and mask[0].sum() == 1  # an empty caption is its end alone


def test_captions_are_cleaned_as_diffusers_cleans_them():
  spaces = [*CAPTIONS, *(f"a{chr(code)}{chr(code)}b" for code in (0x1c, 0x85, 0xa0, 0x2028, 0x3000, 0x200b))]
  assert [tokenizer.clean(caption) for caption in spaces] == [prompt_clean(caption) for caption in spaces]
  assert tokenizer.clean(CAPTIONS[2]) == "the camera follows Tom & Jerry" == html.unescape(tokenizer.clean(CAPTIONS[2]))
  assert tokenizer.clean(CAPTIONS[3]) == "schön, d'accord"


def test_a_bad_tokenizer_is_refused_in_one_line(folder, tmp_path):
  def refused(path, words, **settings):
    with pytest.raises(BadInput, match=words) as caught:
      tokenizer.read(str(path), **settings)
    assert "\n" not in str(caught.value)

  refused(tmp_path / "nowhere", r"no tokenizer at .*nowhere: give the folder google/umt5-xxl")
  (tmp_path / "spiece.model").write_bytes(b"\n\x0e")
  refused(tmp_path, r"no tokenizer at .*tokenizer.json: give the folder")
  whole = (folder / "tokenizer.json").read_text()
  for text_in_file in (whole[: len(whole) // 2], "", '{"model": 3}'):
    (tmp_path / "tokenizer.json").write_text(text_in_file)
    refused(tmp_path, r"tokenizer.json is no readable tokenizer \(.+\): give")
  (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
  refused(tmp_path, "is no readable tokenizer")
  endless = json.loads(whole) | {"post_processor": None}
  (tmp_path / "tokenizer.json").write_text(json.dumps(endless))
  refused(tmp_path, "is not of the T5 kind, which pads with <pad> and ends every text with </s>")
  refused(folder, r"knows \d+ tokens and the text encoder 20: take the tokenizer", vocabulary=20)


@pytest.mark.parametrize("sizes", [{}, {"data": 4, "tensor": 2}])
def test_captions_become_text_tokens_as_upstream_makes_them(folder, text_model, sizes):
  """Three captions also where four devices split the batch; the witness cleans, tokenises, encodes and cuts."""
  model, params = text_model
  encoder = text.TextEncoder(text.UMT5(TEXT, mesh.build(sizes)), tokenizer.read(str(folder), 30, 150))
  told = CAPTIONS[1:4]
  theirs = tokenise(folder, told, 30)
  ours = encoder(params, told)
  assert isinstance(ours, np.ndarray) and ours.dtype == np.float32
  assert apart(ours, text_judge(model, theirs["input_ids"], theirs["attention_mask"])) < CLOSE
