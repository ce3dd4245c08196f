"""The text and image encoders equal transformers', whatever the padding, the mesh and the file they come from."""

import html
import json
import math
import re
from dataclasses import replace
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
from compare import apart
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from safetensors.numpy import save_file
from transformers import (
  AutoTokenizer,
  CLIPVisionConfig,
  CLIPVisionModel,
  PreTrainedTokenizerFast,
  UMT5Config,
  UMT5EncoderModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from anisora_jax.errors import BadInput
from anisora_jax.models import names
from anisora_jax.models.wan import encoder_names, image, text, tokenizer
from anisora_jax.models.wan.encoder_placement import IMAGE_RULES, TEXT_RULES
from anisora_jax.parallel import mesh, placement

TEXT = text.TextSize(layers=3, width=24, heads=4, head_width=10, mlp=40, vocabulary=150)
IMAGE = image.ImageSize(layers=4, width=24, heads=3, mlp=40, patch=6, side=30)
CLOSE = 1e-5  # sums in another order differ by some f32 roundings of the largest number


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


def image_witness(size: image.ImageSize) -> CLIPVisionModel:
  return CLIPVisionModel(CLIPVisionConfig(
    hidden_size=size.width, intermediate_size=size.mlp, num_hidden_layers=size.layers, num_attention_heads=size.heads,
    image_size=size.side, patch_size=size.patch, hidden_act="gelu", layer_norm_eps=1e-5))


def tensors(model: torch.nn.Module) -> dict:
  """A witness' tensors by the names of published files."""
  state = model.state_dict()
  return {known: state[name] for name, known in encoder_names.used(state).items()}


def arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
  return {name: x.numpy() for name, x in tensors(model).items()}


@pytest.fixture(scope="module")
def text_model() -> tuple[UMT5EncoderModel, dict]:
  model = randomised(text_witness(TEXT))
  with torch.no_grad():  # large enough that a bias of the wrong distance or layer is seen
    for block in model.encoder.block:
      block.layer[0].SelfAttention.relative_attention_bias.weight.mul_(2)
  params = names.from_torch(arrays(model), encoder_names.text_entries(TEXT, "huggingface"))
  return model, jax.tree.map(jnp.asarray, params)


def captions(s: int, *lengths: int) -> tuple[np.ndarray, np.ndarray]:
  """Random ids `[b, s]` of captions of these lengths; behind them stands noise, which a mask must hide."""
  ids = np.random.default_rng(s).integers(0, TEXT.vocabulary, (len(lengths), s), dtype=np.int32)
  return ids, np.arange(s) < np.array(lengths)[:, None]


def text_judge(model, ids, mask) -> np.ndarray:
  with torch.no_grad():
    out = model(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.numpy()
  return np.where(mask[..., None], out, 0)  # Wan keeps the real rows and fills with zeros


def products(lowered) -> list[str]:
  """The number types that a traced function multiplies, once for each matrix product."""
  return re.findall(r"dot_general .*: \(tensor<[^>]*x(\w+)>, tensor<[^>]*x\1>\)", lowered.as_text())


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
  lowered = text.encode.lower(text.UMT5(TEXT, single(), jnp.bfloat16), params, ids, mask)
  assert sorted(products(lowered)) == ["bf16"] * 9  # q k v, logits, values, o; gate, up, down


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


@pytest.fixture(scope="module")
def image_model() -> tuple[CLIPVisionModel, dict]:
  model = randomised(image_witness(IMAGE))
  params = names.from_torch(arrays(model), encoder_names.image_entries(IMAGE, "huggingface"))
  return model, jax.tree.map(jnp.asarray, params)


def frames(b: int, height: int, width: int) -> np.ndarray:
  """Noise over all of [-1, 1]: with fine detail, so that the way of resizing is seen."""
  return np.random.default_rng(height).uniform(-1, 1, (b, height, width, 3)).astype(np.float32)


def upstream_prepares(films: np.ndarray, antialias: bool = False, dtype=torch.float64, side: int = 224) -> np.ndarray:
  """What Wan 2.1 makes of frames before its CLIP (wan/modules/clip.py)."""
  first = torch.tensor(films, dtype=dtype).permute(0, 3, 1, 2)
  square = torch.nn.functional.interpolate(first, size=(side, side), mode="bicubic", align_corners=False,
                                           antialias=antialias)
  mean, deviation = (torch.tensor(x, dtype=dtype).view(3, 1, 1) for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
  return ((square.mul(0.5).add(0.5) - mean) / deviation).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(("height", "width"), [(480, 832), (224, 224), (37, 301), (1, 5), (720, 100)])
def test_frames_are_prepared_as_upstream_prepares_them(height, width):
  films = frames(1, height, width)
  ours = image.prepare(jnp.asarray(films), 224)
  # In f32 torch rounds the place of a pixel, which over hundreds of pixels of noise shows in the fifth digit.
  assert apart(ours, upstream_prepares(films)) < 1e-6
  assert apart(ours, upstream_prepares(films, dtype=torch.float32)) < 2e-4
  assert height <= 224 or apart(ours, upstream_prepares(films, antialias=True)) > 0.1  # which is another thing


@pytest.mark.parametrize(("b", "height", "width"), [(1, 30, 30), (2, 45, 17), (3, 12, 64)])
def test_image_tokens_and_summary_equal_transformers(image_model, b, height, width):
  model, params = image_model
  films = frames(b, height, width)
  with torch.no_grad():
    square = torch.tensor(upstream_prepares(films, side=IMAGE.side)).float().permute(0, 3, 1, 2)
    theirs = model(square, output_hidden_states=True)
  network = image.CLIPVision(IMAGE, single())
  whole = jax.jit(lambda params, films: network.apply({"params": params}, image.prepare(films, IMAGE.side)))
  tokens, summary = whole(params, films)
  assert tokens.shape == (b, IMAGE.tokens, IMAGE.width)
  assert apart(tokens, theirs.hidden_states[-2]) < CLOSE and apart(summary, theirs.pooler_output) < CLOSE


def test_bf16_image_tokens_stay_close(image_model):
  films, (model, params) = frames(2, 40, 50), image_model
  with torch.no_grad():
    square = torch.tensor(upstream_prepares(films, side=IMAGE.side)).float().permute(0, 3, 1, 2)
    exact = model(square, output_hidden_states=True).hidden_states[-2]
  assert apart(image.encode(image.CLIPVision(IMAGE, single()), params, films), exact) < CLOSE
  half = image.CLIPVision(IMAGE, single(), jnp.bfloat16)
  ours = image.encode(half, params, films)
  assert ours.dtype == jnp.float32 and 1e-4 < apart(ours, exact) < 2e-2
  # Patches, qkv, logits, values, o, up, down, and of the last block nothing; the image is resized in f32.
  assert sorted(products(image.encode.lower(half, params, films))) == ["bf16"] * 7 + ["f32"] * 2


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "seq": 2}])
def test_image_tokens_are_the_same_on_every_mesh(image_model, sizes):
  eight = mesh.build(sizes)
  encoder = image.ImageEncoder(image.CLIPVision(IMAGE, eight))
  placed = placement.shardings(IMAGE_RULES, image.abstract_params(encoder.network), eight)
  films = frames(3, 40, 50)
  ours = encoder(jax.device_put(image_model[1], placed), films)
  alone = image.encode(image.CLIPVision(IMAGE, single()), image_model[1], films)
  assert isinstance(ours, np.ndarray) and apart(ours, alone) < CLOSE


def native_text(state: dict) -> dict:
  """The tensors of a transformers state under the native names, by substitutions of its own."""
  swaps = [(r"^shared", "token_embedding"), (r"^encoder\.final_layer_norm", "norm"), (r"^encoder\.block", "blocks"),
           (r"layer\.0\.SelfAttention\.relative_attention_bias", "pos_embedding.embedding"),
           (r"layer\.0\.SelfAttention", "attn"), (r"layer\.0\.layer_norm", "norm1"), (r"layer\.1\.layer_norm", "norm2"),
           (r"layer\.1\.DenseReluDense\.wi_0", "ffn.gate.0"), (r"layer\.1\.DenseReluDense\.wi_1", "ffn.fc1"),
           (r"layer\.1\.DenseReluDense\.wo", "ffn.fc2")]
  return {reduce(lambda name, swap: re.sub(*swap, name), swaps, name): x for name, x in state.items()}


def native_image(state: dict) -> dict:
  swaps = [(r"^vision_model\.(embeddings\.)?", "visual."), (r"class_embedding", "cls_embedding"),
           (r"position_embedding\.weight", "pos_embedding"), (r"pre_layrnorm", "pre_norm"),
           (r"post_layernorm", "post_norm"), (r"encoder\.layers", "transformer"), (r"layer_norm(\d)", r"norm\1"),
           (r"self_attn\.q_proj", "attn.to_qkv"), (r"self_attn\.out_proj", "attn.proj"),
           (r"mlp\.fc1", "mlp.0"), (r"mlp\.fc2", "mlp.2")]
  made = {}
  for name, x in state.items():
    if "q_proj" in name:
      x = torch.cat([state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
    if "class_embedding" in name or "position_embedding" in name:
      x = x.reshape(1, -1, x.shape[-1])
    if not re.search("[kv]_proj", name):
      made[reduce(lambda name, swap: re.sub(*swap, name), swaps, name)] = x
  return made


NATIVE = {"text": native_text, "image": native_image}
ENTRIES = {"text": encoder_names.text_entries, "image": encoder_names.image_entries}
WITNESS = {"text": text_witness, "image": image_witness}
PUBLISHED = {"text": (text.TEXT_SIZES["umt5_xxl"], 5_680_910_336),
             "image": (image.IMAGE_SIZES["clip_vit_h"], 630_766_080)}


@pytest.mark.parametrize("kind", ENTRIES)
def test_full_size_tables_equal_transformers(kind):
  size, count = PUBLISHED[kind]
  with torch.device("meta"):
    state = tensors(WITNESS[kind](size))
  for naming, witness in (("huggingface", state), ("native", NATIVE[kind](state))):
    ours = names.table(ENTRIES[kind](size, naming))
    assert ours == {name: tuple(x.shape) for name, x in witness.items()}
    assert sum(map(math.prod, ours.values())) == count


def test_a_device_of_eight_holds_an_eighth_of_the_published_text_encoder():
  eight = mesh.build({"fsdp": 4, "tensor": 2})
  shapes = text.abstract_params(text.UMT5(PUBLISHED["text"][0], eight))
  placed = placement.shardings(TEXT_RULES, shapes, eight)
  shares = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)), shapes, placed)
  assert 1 <= sum(jax.tree.leaves(shares)) / (PUBLISHED["text"][1] / 8) < 1.001


@pytest.mark.parametrize("kind", ENTRIES)
def test_our_paths_are_those_of_the_network(kind):
  network, module = {"text": (text.UMT5(TEXT, single()), text),
                     "image": (image.CLIPVision(IMAGE, single()), image)}[kind]
  made = {placement.path_text(path): x.shape
          for path, x in jax.tree_util.tree_leaves_with_path(module.abstract_params(network))}
  for naming in encoder_names.NAMINGS:
    assert names.shapes(ENTRIES[kind](network.size, naming)) == made


@pytest.mark.parametrize("kind", ENTRIES)
def test_both_namings_come_home_to_the_bit(kind, text_model, image_model):
  model, params = {"text": text_model, "image": image_model}[kind]
  size = {"text": TEXT, "image": IMAGE}[kind]
  for naming, state in (("huggingface", tensors(model)), ("native", NATIVE[kind](tensors(model)))):
    state = {name: x.numpy() for name, x in state.items()}
    ours = names.from_torch(state, ENTRIES[kind](size, naming))
    jax.tree.map(np.testing.assert_array_equal, ours, params)
    back = names.to_torch(ours, ENTRIES[kind](size, naming))
    assert back.keys() == state.keys() and all(np.array_equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", ENTRIES)
def test_transformers_loads_what_we_name(kind, text_model, image_model, tmp_path):
  model, params = {"text": text_model, "image": image_model}[kind]
  size = {"text": TEXT, "image": IMAGE}[kind]
  model.config.save_pretrained(tmp_path)
  save_file(names.to_torch(params, ENTRIES[kind](size, "huggingface")), tmp_path / "model.safetensors")
  loaded, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
  assert not any(told.values()), told
  state = loaded.state_dict()
  assert all(torch.equal(state[name], x) for name, x in model.state_dict().items())


def test_a_file_may_hold_more_than_we_use_and_name_it_otherwise():
  found = ["textual.token_embedding.weight", "log_scale", "visual.head", "visual.post_norm.weight"]
  assert encoder_names.used(found) == {found[3]: found[3]}
  found = ["vision_model.embeddings.position_ids", "embeddings.class_embedding", "encoder.layers.0.mlp.fc1.bias"]
  assert encoder_names.used(found) == {name: f"vision_model.{name}" for name in found[1:]}
  copy, shared = "encoder.embed_tokens.weight", "shared.weight"
  assert encoder_names.used([copy]) == {copy: shared} and encoder_names.used([copy, shared]) == {shared: shared}
  assert encoder_names.used(["encoder.block.0.strange"]) == {"encoder.block.0.strange": "encoder.block.0.strange"}


def test_an_image_size_that_does_not_divide_is_refused():
  with pytest.raises(BadInput, match="an image of 30 does not divide into patches of 7, or a width of 24 into 3 heads"):
    replace(IMAGE, patch=7)
