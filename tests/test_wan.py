"""The Wan transformer equals diffusers' under every condition; a vector of noise times costs what one time costs."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compare import apart
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from anisora_jax.errors import BadInput
from anisora_jax.models import names, rope
from anisora_jax.models.remat import REMAT
from anisora_jax.models.wan.dit import WanDiT
from anisora_jax.models.wan.names import NAMINGS, entries
from anisora_jax.models.wan.placement import RULES
from anisora_jax.models.wan.sizes import SIZES, Size
from anisora_jax.parallel import mesh, placement

TEXT = Size(layers=2, width=48, heads=2, mlp=80, channels=4, text_width=20, text_tokens=11)
GIVEN = replace(TEXT, channels=16, given=20)                     # Wan 2.2 image-to-video: 36 channels in
IMAGE = replace(GIVEN, image_width=28, text_tokens=512)          # Wan 2.1's; diffusers cuts image from text at 512
POSITIONS = replace(IMAGE, image_positions=6)                    # first and last frame: positions of image tokens
CASES = {  # size, clip [b, f, h, w], text tokens given, image tokens
  "text": (TEXT, (2, 3, 6, 10), 7, 0),
  "one frame, whole text": (TEXT, (1, 1, 2, 6), 11, 0),
  "given": (GIVEN, (2, 2, 10, 6), 0, 0),
  "given and image": (IMAGE, (2, 3, 6, 2), 9, 5),
  "given and image with positions": (POSITIONS, (2, 3, 6, 2), 9, 6),
}
# Elements and gradients that add tens of terms in another order differ by some f32 roundings of their largest.
CLOSE = 1e-5


def witness(size: Size) -> WanTransformer3DModel:
  return WanTransformer3DModel(
    num_attention_heads=size.heads, attention_head_dim=size.head_width, in_channels=size.channels + size.given,
    out_channels=size.channels, text_dim=size.text_width, freq_dim=size.waves, ffn_dim=size.mlp,
    num_layers=size.layers, image_dim=size.image_width or None, pos_embed_seq_len=size.image_positions or None,
    added_kv_proj_dim=size.width if size.image_width else None)


def randomised(size: Size) -> WanTransformer3DModel:
  """A witness in which no parameter has kept its start: no zeros, no ones."""
  model, draw = witness(size), torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      p.copy_(torch.randn(p.shape, generator=draw) * (p[0].numel() ** -0.5 if p.ndim in (2, 5) else 0.3))
      if "norm" in name and name.endswith("weight"):
        p.add_(1)
  return model


def params_of(model: torch.nn.Module, size: Size, grads=False) -> dict:
  return names.from_torch({name: (p.grad if grads else p).detach().numpy() for name, p in model.named_parameters()},
                          entries(size, "diffusers"))


def condition(size: Size, clip: tuple, s: int, i: int) -> dict:
  """Random inputs of our network, one noise time a clip."""
  draw = np.random.default_rng(0)

  def normal(*shape):
    return draw.normal(size=shape).astype(np.float32)

  return {"x": normal(*clip, size.channels), "t": draw.uniform(size=(clip[0], 1)).astype(np.float32),
          "text": normal(clip[0], s, size.text_width),
          "given": normal(*clip, size.given) if size.given else None,
          "image": normal(clip[0], i, size.image_width) if i else None}


def judge(model, size: Size, x, t, text, given=None, image=None) -> torch.Tensor:
  """The witness on our inputs: channels first, times 0 .. 1000 (those of frames told per token), padded text."""
  seen = x if given is None else np.concatenate([x, given], -1)
  text = np.pad(text, ((0, 0), (0, size.text_tokens - text.shape[1]), (0, 0)))
  n = x.shape[2] * x.shape[3] // size.patch**2
  t = np.float32(1000) * t
  t = t[:, 0] if t.shape[1] == 1 else (np.repeat(t, n, axis=1) if t.ndim == 2 else t.reshape(len(t), -1))
  if size.image_positions:  # the witness takes the tokens of both frames as two of the batch
    image = image.reshape(2 * image.shape[0], -1, image.shape[2])
  v = model(torch.from_numpy(np.moveaxis(seen, -1, 1)), torch.from_numpy(t), torch.from_numpy(text),
            None if image is None else torch.from_numpy(image)).sample
  return torch.movedim(v, 1, -1)


def network(size: Size, **options) -> WanDiT:
  return WanDiT(size, mesh.build(), **options)


def shapes(size: Size) -> dict:
  """Our parameters without their numbers."""
  def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  given = array(1, 1, 2, 2, size.given) if size.given else None
  image = array(1, size.image_positions or 3, size.image_width) if size.image_width else None
  return jax.eval_shape(network(size).init, jax.random.key(0), array(1, 1, 2, 2, size.channels), array(1, 1),
                        array(1, 1, size.text_width), given, image)["params"]


def velocity(net: WanDiT):
  """(params, inputs) -> velocity, compiled."""
  return jax.jit(lambda params, inputs: net.apply({"params": params}, **inputs))


def gradients(net: WanDiT):
  """(params, inputs) -> (loss, gradients), compiled; the loss is the mean square of the velocity."""
  def loss(params, inputs):
    return jnp.square(net.apply({"params": params}, **inputs)).mean()

  return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module")
def text_model():
  model = randomised(TEXT)
  return model, params_of(model, TEXT)


@pytest.fixture(scope="module")
def forward():
  return velocity(network(TEXT))


@pytest.fixture(scope="module")
def text_steps():
  """The compiled training gradient by rematerialisation policy, and "times": by default with one time a frame."""
  inputs = condition(*CASES["text"])
  asked = {name: (name, inputs) for name in REMAT}
  asked["times"] = "attention", inputs | {"t": np.zeros((2, 3), np.float32)}
  return {name: gradients(network(TEXT, remat=remat)).lower(shapes(TEXT), inputs).compile()
          for name, (remat, inputs) in asked.items()}


@pytest.mark.parametrize("case", CASES)
def test_velocity_equals_the_witness(case):
  size = CASES[case][0]
  model, inputs = randomised(size), condition(*CASES[case])
  ours = velocity(network(size))(params_of(model, size), inputs)
  assert apart(ours, judge(model, size, **inputs).detach()) < CLOSE


def test_norms_of_faint_tokens_equal_the_witness():
  """Numbers of about 1e-3 make every norm feel the small term under its root, 1e-6 or, for image tokens, 1e-5."""
  model, inputs = randomised(IMAGE), condition(*CASES["given and image"])
  with torch.no_grad():
    for name, p in model.named_parameters():
      if re.search(r"patch_embedding|to_q|to_k|add_k|to_out|image_embedder.ff.net.2|norm2.bias", name):
        p.mul_(1e-3)
  inputs["image"] *= 1e-3
  ours = velocity(network(IMAGE))(params_of(model, IMAGE), inputs)
  assert apart(ours, judge(model, IMAGE, **inputs).detach()) < CLOSE


def test_every_gradient_equals_the_witness(text_model, text_steps):
  image_model = randomised(IMAGE)
  image_case = image_model, params_of(image_model, IMAGE), condition(*CASES["given and image"])
  for size, (model, params, inputs), step in [
    (TEXT, (*text_model, condition(*CASES["text"])), text_steps["attention"]),
    (IMAGE, image_case, gradients(network(IMAGE))),
  ]:
    loss = judge(model, size, **inputs).square().mean()
    model.zero_grad()
    loss.backward()
    worst = jax.tree.map(apart, step(params, inputs)[1], params_of(model, size, grads=True))
    assert max(jax.tree.leaves(worst)) < 1e-4, worst


def test_a_time_for_each_frame_equals_a_time_for_each_token(text_model, forward):
  model, params = text_model
  inputs = condition(*CASES["text"]) | {"t": np.float32([[0, 0.3, 1], [0.8, 0.8, 0.1]])}
  assert apart(forward(params, inputs), judge(model, TEXT, **inputs).detach()) < CLOSE


def test_a_time_for_each_token_equals_the_witness_and_times_of_frames_spelt_out(text_model, forward):
  model, params = text_model
  frames = np.float32([[0, 0.3, 1], [0.8, 0.8, 0.1]])
  inputs, spelt = condition(*CASES["text"]), np.repeat(frames[:, :, None], 15, axis=2)
  inputs["t"] = np.random.default_rng(1).uniform(size=(2, 3, 15)).astype(np.float32)
  assert apart(forward(params, inputs), judge(model, TEXT, **inputs).detach()) < CLOSE
  assert apart(forward(params, inputs | {"t": spelt}), forward(params, inputs | {"t": frames})) < 1e-6


@pytest.mark.parametrize("sizes", [{"data": 2, "seq": 4}, {"data": 2, "seq": 2, "tensor": 2}], ids=str)
def test_a_time_for_each_token_teaches_the_same_on_every_mesh(sizes, text_model):
  """15 tokens a frame divide by neither: the times are padded as the tokens are."""
  inputs, on = condition(*CASES["text"]), mesh.build(sizes)
  inputs["t"] = np.random.default_rng(1).uniform(size=(2, 3, 15)).astype(np.float32)
  placed = placement.shardings(RULES, text_model[1], on), NamedSharding(on, P(mesh.BATCH))
  split = gradients(WanDiT(TEXT, on))(*jax.device_put((text_model[1], inputs), placed))
  worst = jax.tree.map(apart, split, gradients(network(TEXT))(text_model[1], inputs))
  assert max(jax.tree.leaves(worst)) < 1e-4, worst


def test_equal_times_for_all_frames_are_one_time(text_model, forward):
  inputs = condition(*CASES["text"])
  one = forward(text_model[1], inputs)
  every = forward(text_model[1], inputs | {"t": np.repeat(inputs["t"], 3, axis=1)})
  assert apart(every, one) < 1e-6


def test_a_frame_time_reaches_every_frame(text_model, forward):
  inputs = condition(*CASES["text"]) | {"t": np.full((2, 3), 0.5, np.float32)}
  moved = inputs | {"t": np.float32([[0.5, 0.5, 0.5], [0.5, 0.9, 0.5]])}
  change = np.abs(forward(text_model[1], inputs) - forward(text_model[1], moved)).max(axis=(2, 3, 4))
  assert (change[0] == 0).all() and (change[1] > 1e-4).all()


def test_text_padding_is_zeros_that_take_part(text_model, forward):
  inputs = condition(*CASES["text"])
  padded = inputs | {"text": np.pad(inputs["text"], ((0, 0), (0, 4), (0, 0)))}
  assert (forward(text_model[1], inputs) == forward(text_model[1], padded)).all()


PUBLISHED = {  # parameters, tensors
  "wan21_t2v_1p3b": (1_418_996_800, 825), "wan21_t2v_14b": (14_288_491_584, 1095),
  "wan21_i2v_1p3b": (1_564_428_608, 983), "wan21_i2v_14b": (16_394_878_784, 1303),
  "wan21_flf2v_14b": (16_395_536_704, 1304), "wan22_t2v_a14b": (14_288_491_584, 1095),
  "wan22_i2v_a14b": (14_288_901_184, 1095), "wan22_ti2v_5b": (4_999_787_712, 825),
}


def test_every_published_size_is_counted_below():
  assert {name for name in SIZES if name.startswith("wan")} == set(PUBLISHED)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_counted_exactly_and_as_published(name):
  size = SIZES[name]
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(size)))
  assert (size.parameters(), count) == (count, PUBLISHED.get(name, (count,))[0])
  assert name not in PUBLISHED or len(names.table(entries(size, "native"))) == PUBLISHED[name][1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_the_published_models(name):
  with torch.device("meta"):
    theirs = {key: tuple(p.shape) for key, p in witness(SIZES[name]).state_dict().items()}
  assert names.table(entries(SIZES[name], "diffusers")) == theirs


@pytest.mark.parametrize("size", [GIVEN, IMAGE], ids=["given", "image"])
def test_native_names_become_diffusers_names_by_diffusers_own_conversion(size):
  tensors = names.from_torch(randomised_tensors(size), entries(size, "diffusers"))
  native = {name: torch.from_numpy(x) for name, x in names.to_torch(tensors, entries(size, "native")).items()}
  converted, ours = convert_wan_transformer_to_diffusers(native), names.to_torch(tensors, entries(size, "diffusers"))
  assert set(converted) == set(ours)
  assert all((converted[name].numpy() == ours[name]).all() for name in ours)


def randomised_tensors(size: Size) -> dict[str, np.ndarray]:
  return {name: p.detach().numpy() for name, p in randomised(size).named_parameters()}


@pytest.mark.parametrize("naming", NAMINGS)
def test_names_there_and_back_change_no_bit(naming):
  params = names.from_torch(randomised_tensors(IMAGE), entries(IMAGE, "diffusers"))
  back = names.from_torch(names.to_torch(params, entries(IMAGE, naming)), entries(IMAGE, naming))
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes(IMAGE))
  assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == np.float32 and (a == b).all(), params, back))


def test_leftovers_gaps_and_wrong_shapes_are_refused_by_name():
  params = names.from_torch(randomised_tensors(TEXT), entries(TEXT, "diffusers"))
  tensors = names.to_torch(params, entries(TEXT, "native"))
  gap = {name: x for name, x in tensors.items() if name != "blocks.1.norm3.bias"}
  for wrong, naming, words in [
    (tensors | {"blocks.1.ffn.0.wieght": np.zeros(3)}, "native", r"blocks.1.ffn.0.wieght; .*blocks.1.ffn.0.weight"),
    (gap, "native", "missing tensors: blocks.1.norm3.bias; .*blocks.0.norm3.bias"),
    (tensors | {"head.head.bias": np.zeros(3)}, "native", r"head.head.bias has shape \(3,\) .* wants \(16,\)"),
    (tensors, "diffusers", "time_embedding.0.weight and .* more; .* check the size and the naming"),
    (tensors, "natvie", "did you mean 'native'"),
  ]:
    with pytest.raises(BadInput, match=words) as mistake:
      names.from_torch(wrong, entries(TEXT, naming))
    assert "\n" not in str(mistake.value)
  with pytest.raises(BadInput, match="tail; the nearest"):
    names.to_torch(params | {"tail": np.zeros(3)}, entries(TEXT, "native"))
  with pytest.raises(BadInput, match=r"blocks/modulation has shape \(2, 6, 48\) .* wants \(3, 6, 48\)"):
    names.to_torch(params, entries(replace(TEXT, layers=3), "native"))


def test_image_tokens_must_be_as_many_as_their_positions():
  inputs = condition(POSITIONS, (1, 1, 2, 2), 0, 5)
  with pytest.raises(BadInput, match=r"5 image tokens and 6 positions: .* first frame's tokens, then the last"):
    jax.eval_shape(network(POSITIONS).init, jax.random.key(0), **inputs)


def test_rope_turns_complex_numbers():
  """Pair i of a head is the complex number x[2i] + 1j x[2i+1]; its axis' position turns it by exp(1j position rate)."""
  b, f, h, w, heads, width = 1, 4, 3, 5, 2, 128
  x = np.random.default_rng(0).normal(size=(b, f, h * w, heads, width)).astype(np.float32)
  rates = [10000.0 ** (-2 * np.arange(pairs) / (2 * pairs)) for pairs in (22, 21, 21)]
  want = np.empty_like(x)
  for frame, row, column in np.ndindex(f, h, w):
    turn = np.exp(1j * np.concatenate([p * r for p, r in zip((frame, row, column), rates, strict=True)]))
    token = x[:, frame, row * w + column].astype(np.float64)
    turned = (token[..., 0::2] + 1j * token[..., 1::2]) * turn
    want[:, frame, row * w + column, :, 0::2], want[:, frame, row * w + column, :, 1::2] = turned.real, turned.imag
  assert apart(rope.rotate(jnp.asarray(x), *rope.turns(jnp.asarray(rope.grid(f, h, w)), width)), want) < 1e-6


def test_a_vector_of_times_costs_the_memory_of_one_time(text_steps):
  scalar, vector = (text_steps[name].memory_analysis().temp_size_in_bytes for name in ("attention", "times"))
  assert 0 < vector <= 1.05 * scalar, (vector, scalar)


def test_no_modulation_is_spelt_out_for_each_token(text_steps):
  """Looks for any array, fused or not, with as many elements as b tokens 6 d, or that in every layer."""
  arrays = re.findall(r"f32\[([\d,]+)\]", text_steps["times"].as_text())
  sizes = {math.prod(int(side) for side in sides.split(",")) for sides in arrays}
  frames, tokens = 2 * 3 * 6 * TEXT.width, 2 * 45 * 6 * TEXT.width
  assert frames in sizes and not sizes & {tokens, TEXT.layers * tokens}


def test_rematerialisation_changes_no_gradient(text_model, text_steps):
  results = {name: text_steps[name](text_model[1], condition(*CASES["text"])) for name in REMAT}
  for name, result in results.items():
    worst = jax.tree.map(apart, result, results["none"])
    assert max(jax.tree.leaves(worst)) < CLOSE, (name, worst)


def test_attention_is_computed_once_unless_all_is_computed_twice(text_steps):
  """Exponentials of all logits, [b a, l, l]: forward, in the backward pass, and when forward is done again."""
  weights = re.compile(r"= f32\[4,45,45\]\S* exponential\(")
  count = {name: len(weights.findall(text_steps[name].as_text())) for name in REMAT}
  assert count == {"none": 2, "attention": 2, "attention_offload": 2, "matmuls": 3, "full": 3, "full_offload": 3,
                   "offload": 2}


def test_bf16_arithmetic_stays_close_and_parameters_stay_f32(text_model):
  model, params = text_model
  inputs = condition(*CASES["text"])
  net = network(TEXT, dtype=jnp.bfloat16)
  made = jax.eval_shape(net.init, jax.random.key(0), *map(jnp.asarray, (inputs["x"], inputs["t"], inputs["text"])))
  assert {leaf.dtype for leaf in jax.tree.leaves(made["params"])} == {jnp.dtype("float32")}
  ours = velocity(net)(params, inputs)
  # bf16 keeps 8 bits: each of some ten roundings in a row costs up to 2^-9 of its number.
  assert ours.dtype == jnp.float32 and 1e-4 < apart(ours, judge(model, TEXT, **inputs).detach()) < 3e-2
