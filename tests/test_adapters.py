"""Adapters: peft and diffusers load and compute what we do; merged equals unmerged; only adapters have moments."""


import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import flatten_dict

from anisora_jax.adapters import files, lora
from anisora_jax.adapters.lora import Lora
from anisora_jax.errors import BadInput
from anisora_jax.models import names
from anisora_jax.models.wan.dit import WanDiT
from anisora_jax.models.wan.names import NAMINGS, entries
from anisora_jax.models.wan.sizes import Size
from anisora_jax.parallel import mesh

SIZE = Size(layers=3, width=24, heads=2, mlp=40, channels=4, given=5, text_width=20, text_tokens=8, image_width=12,
            waves=16)
LORA = Lora(rank=3, alpha=6.0)
TABLES = {naming: entries(SIZE, naming) for naming in NAMINGS}


def normal(tree, seed, scale=0.3):
  """A tree of these shapes, no number at its start."""
  draw = np.random.default_rng(seed)
  return jax.tree.map(lambda x: (scale * draw.normal(size=x.shape)).astype(np.float32), tree)


@pytest.fixture(scope="module")
def net():
  return WanDiT(SIZE, mesh.build())


@pytest.fixture(scope="module")
def inputs():
  draw = np.random.default_rng(5)
  shapes = {"x": (2, 2, 4, 6, 4), "t": (2, 2), "text": (2, 8, 20), "given": (2, 2, 4, 6, 5), "image": (2, 3, 12)}
  drawn = {name: jnp.float32(draw.normal(size=shape)) for name, shape in shapes.items()}
  return drawn | {"t": jnp.full((2, 2), 0.3)}


@pytest.fixture(scope="module")
def base(inputs):
  shapes = jax.eval_shape(WanDiT(SIZE, mesh.build()).init, jax.random.key(0), **inputs)["params"]
  return normal(shapes, 0)


@pytest.fixture(scope="module")
def adapters(base):
  return normal(lora.begin(LORA, base, jax.random.key(0)), 1)


@pytest.fixture(scope="module")
def network(net, inputs):
  """The network of a joined tree."""
  def apply(params):
    return net.apply({"params": lora.scaled(params, LORA.scale)}, **inputs)

  return apply


@pytest.fixture(scope="module")
def run(network):
  return jax.jit(network)


def test_new_adapters_meet_what_was_named_and_change_nothing(run, base):
  begun = lora.begin(LORA, base, jax.random.key(0))
  flat = flatten_dict(begun, sep="/")
  layers = {path.rpartition("/")[0] for path in flat}
  assert layers == {f"blocks/{kind}_attention/{name}" for kind in ("self", "cross") for name in "qkvo"} | {
    "blocks/mlp/up", "blocks/mlp/down"}
  assert flat["blocks/mlp/up/lora_a"].shape == (3, 24, 3) and flat["blocks/mlp/up/lora_b"].shape == (3, 3, 40)
  assert 0.9 < float(abs(flat["blocks/mlp/up/lora_a"]).max()) * 24**0.5 <= 1
  np.testing.assert_array_equal(run(lora.join(base, begun)), run(base))


def test_merged_equals_unmerged(run, base, adapters):
  merged = lora.merge(base, adapters, LORA.scale)
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  ours, theirs = run(lora.join(base, adapters)), run(merged)
  assert float(abs(ours - run(base)).max()) > 0.1
  assert float(abs(ours - theirs).max() / abs(theirs).max()) < 1e-5


def test_a_frozen_kernel_costs_no_gradient(net, base, adapters, inputs):
  def loss(base, adapters):
    return (net.apply({"params": lora.join(base, adapters)}, **inputs) ** 2).mean()

  flops = [jax.jit(jax.grad(loss, of)).lower(base, adapters).compile().cost_analysis()["flops"] for of in (0, 1)]
  assert flops[1] < 0.85 * flops[0]  # two thirds, the adapters themselves, and what is no product


def test_peft_and_diffusers_load_our_file_and_compute_the_same(run, base, adapters, inputs):
  model = diffusers.WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, in_channels=9, out_channels=4, text_dim=20, freq_dim=16, ffn_dim=40,
    num_layers=3, image_dim=12, added_kv_proj_dim=24)
  model.load_state_dict({name: torch.tensor(x) for name, x in names.to_torch(base, TABLES["diffusers"]).items()})
  tensors = files.write(adapters, LORA.scale, TABLES, "diffusers")
  model.load_lora_adapter({name: torch.tensor(x) for name, x in tensors.items()}, prefix="transformer")
  loaded = {name for name, _ in model.named_parameters() if "lora_" in name}
  assert len(loaded) == len(tensors) == 3 * 10 * 2
  folded = names.to_torch(lora.merge(base, adapters, LORA.scale), TABLES["diffusers"])
  model.fuse_lora()
  fused = {name.replace(".base_layer", ""): x.numpy() for name, x in model.state_dict().items()}
  for name, x in folded.items():
    np.testing.assert_allclose(fused[name], x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", files.FORMATS)
def test_every_format_is_recognised_and_comes_back(name, adapters):
  rich = lora.join(adapters, {"blocks": {"self_attention": {"norm_q": {"scale_diff": np.ones((3, 24), np.float32)},
                                                            "q": {"bias_diff": np.ones((3, 24), np.float32)}}},
                              "patch_in": normal({"lora_a": np.zeros((36, 3)), "lora_b": np.zeros((3, 24))}, 2)})
  there = rich if files.FORMATS[name].alpha else {**adapters, "patch_in": rich["patch_in"]}
  back, found = files.read(files.write(there, LORA.scale, TABLES, name), TABLES)
  assert found == name
  there, back = flatten_dict(there, sep="/"), flatten_dict(back, sep="/")
  assert set(there) == set(back)
  for path, x in there.items():
    np.testing.assert_allclose(back[path], x * (LORA.scale if path.endswith("lora_b") else 1), rtol=1e-6)


def test_diffusers_own_conversion_reads_our_comfyui_file_alike(adapters):
  from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers as convert

  theirs = convert({name: torch.tensor(x) for name, x in files.write(adapters, LORA.scale, TABLES, "comfyui").items()})
  ours = files.write(adapters, LORA.scale, TABLES, "diffusers")
  assert set(theirs) == set(ours)
  for module in {name.rpartition(".lora_")[0] for name in ours}:
    there, here = ({side: np.asarray(of[f"{module}.lora_{side}.weight"]) for side in "AB"} for of in (theirs, ours))
    np.testing.assert_allclose(there["B"] @ there["A"], here["B"] @ here["A"], rtol=1e-5, atol=1e-6)


def test_layers_without_an_adapter_and_smaller_ranks_are_filled_with_zeros(base, adapters):
  tensors = dict(files.write(adapters, LORA.scale, TABLES, "kohya"))
  tensors = {name: x for name, x in tensors.items() if "blocks_1_self_attn_q" not in name}
  for end, cut in ((".lora_down.weight", np.s_[:2]), (".lora_up.weight", np.s_[:, :2])):
    tensors["lora_unet_blocks_2_ffn_0" + end] = tensors["lora_unet_blocks_2_ffn_0" + end][cut]
  back, _ = files.read(tensors, TABLES)
  query = back["blocks"]["self_attention"]["q"]
  assert not query["lora_b"][1].any() and query["lora_b"][0].any()
  up, whole = back["blocks"]["mlp"]["up"], adapters["blocks"]["mlp"]["up"]
  change = up["lora_a"][2] @ up["lora_b"][2]  # alpha stayed 6, rank became 2
  np.testing.assert_allclose(change, 3 * whole["lora_a"][2, :, :2] @ whole["lora_b"][2, :2], rtol=1e-5, atol=1e-6)


def test_training_moves_adapters_alone_and_keeps_moments_for_them_alone(network, base, adapters):
  chain = optax.adamw(1e-2)
  opt = chain.init(adapters)
  count = sum(x.size for x in jax.tree.leaves(adapters))
  assert sum(x.size for x in jax.tree.leaves(opt)) == 2 * count + 1  # two moments, and a count of steps

  def loss(adapters, base):
    return jnp.square(network(lora.join(base, adapters))).mean()

  step = jax.jit(jax.value_and_grad(loss))
  placed = jax.device_put(base)
  before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(placed)]
  losses = []
  for _ in range(3):
    value, grads = step(adapters, placed)
    changes, opt = chain.update(grads, opt, adapters)
    adapters, losses = optax.apply_updates(adapters, changes), [*losses, float(value)]
  assert losses[0] > losses[1] > losses[2]
  assert before == [x.unsafe_buffer_pointer() for x in jax.tree.leaves(placed)]
  jax.tree.map(np.testing.assert_array_equal, base, placed)


@pytest.mark.parametrize("change, said", [
  (lambda t: {"text_model.layers.0.lora_A.weight": np.zeros((2, 2))}, "is no adapter of this base by the names of dif"),
  (lambda t: {name.replace("blocks.2", "blocks.3"): x for name, x in t.items()}, "the nearest module is"),
  (lambda t: {name: x for name, x in t.items() if name != "diffusion_model.blocks.0.ffn.0.lora_up.weight"},
   "diffusion_model.blocks.0.ffn.0 has alpha and down alone"),
  (lambda t: t | {"diffusion_model.blocks.0.ffn.0.lora_up.weight": np.zeros((7, 3))}, r"up \(7, 3\) do not fit"),
  (lambda t: t | {"diffusion_model.blocks.0.norm3.diff": np.zeros(7)}, r"diff of shape \(7,\) that does not fit"),
  (lambda t: {}, "an empty file is no adapter"),
])
def test_files_that_do_not_fit_are_refused_in_one_line(change, said, adapters):
  with pytest.raises(BadInput, match=said) as mistake:
    files.read(change(dict(files.write(adapters, LORA.scale, TABLES, "comfyui"))), TABLES)
  assert "\n" not in str(mistake.value)


@pytest.mark.parametrize("wrong, said", [
  ({"rank": 0}, "above 0"), ({"alpha": -1.0}, "above 0"), ({"where": "("}, "no regular expression"),
  ({"where": "attn"}, "meets no kernel"),
])
def test_wrong_settings_are_refused_in_one_line(wrong, said, base):
  with pytest.raises(BadInput, match=said) as mistake:
    lora.begin(Lora(**wrong), base, jax.random.key(0))
  assert "\n" not in str(mistake.value)


def test_a_change_that_a_format_cannot_name_is_refused(adapters):
  rich = lora.join(adapters, {"blocks": {"self_attention": {"q": {"bias_diff": np.ones((3, 24))}}}})
  with pytest.raises(BadInput, match="no name in the format peft: take comfyui or kohya"):
    files.write(rich, 1.0, TABLES, "peft")
