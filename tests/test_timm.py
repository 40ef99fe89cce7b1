"""timm's contract, for every registered name: what timm's own tests ask of its models, and what its users do with them.

Left out: TorchScript (`torch.jit.script`), which torch has deprecated and which cannot type the residual's branch.
"""

import sys

import processes
import pytest
import timm
import torch
from conftest import small_config
from timm.data import resolve_data_config
from timm.layers import set_fused_attn
from timm.models import create_feature_extractor, get_graph_node_names, save_for_hf
from torch.utils.checkpoint import checkpoint

import sret
from sret import InputError, SReT
from sret.checkpoints.card import Card, save_weights
from sret.data.preprocess import Preprocessing

NAMES = timm.list_models("sret*")
SHALLOW = [name for name in NAMES if "deep" not in name]
SMALL = {"img_size": 64}


def images(model, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, model.in_chans, *model.config.input_size)


def small(name: str, **options) -> torch.nn.Module:
    return timm.create_model(name, **{**SMALL, **options}).eval()


def test_all_names_are_registered():
    assert len(NAMES) == 15


@pytest.mark.parametrize("name", SHALLOW)
def test_forward_and_backward(name):
    model = small(name, num_classes=42).train()
    output = model(images(model, 2))
    assert output.shape == (2, 42)
    assert output.isfinite().all()
    output.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", SHALLOW)
def test_the_default_cfg_says_what_the_model_does(name):
    model = timm.create_model(name).eval()
    cfg, keys = model.default_cfg, model.state_dict().keys()
    assert f"{cfg['classifier']}.weight" in keys
    assert f"{cfg['first_conv']}.weight" in keys
    assert cfg["input_size"] == (3, *model.config.input_size)
    assert cfg["pool_size"] == model.config.grids()[-1]
    model = small(name)
    x, grid = images(model), model.config.grids()[-1]
    with torch.no_grad():
        maps = model.forward_features(x)
        assert maps.shape == (1, model.num_features, *grid)
        assert model.forward_head(maps, pre_logits=True).shape == (1, model.head_hidden_size)
        model.reset_classifier(0)
        assert model(x).shape == (1, model.num_features)
        model.reset_classifier(0, "")
        assert model(x).shape == (1, model.num_features, *grid)


@pytest.mark.parametrize("kind", ["getter", "hook", "list", "dict", "fx"])
@pytest.mark.parametrize("name", ["sret_t", "sret_s_unsliced"])
def test_feature_maps_by_every_kind_of_extractor_are_the_stages(name, kind):
    torch.manual_seed(1)
    model = small(name)
    extractor = small(name, features_only=True, feature_cls=kind)
    extractor.load_state_dict(
        {own: model.state_dict()[key] for own, key in zip(extractor.state_dict(), kept(extractor, model), strict=True)}
    )
    x = images(model, 2)
    with torch.no_grad():
        found = extractor(x)
        expected = model.forward_intermediates(x, intermediates_only=True)
    found = list(found.values()) if isinstance(found, dict) else found
    assert extractor.feature_info.channels() == [y.shape[1] for y in expected]
    assert extractor.feature_info.reduction() == [8, 16, 32]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def kept(extractor: torch.nn.Module, model: torch.nn.Module) -> list[str]:
    """The model's keys of what an extractor keeps of it, in order."""
    return [key for key in model.state_dict() if not key.startswith(("head", "norm"))][: len(extractor.state_dict())]


def test_graphs_of_torch_fx_train_and_evaluate():
    model = small("sret_t", num_classes=42)
    train_nodes, eval_nodes = get_graph_node_names(model)
    x = images(model, 2)
    with torch.no_grad():
        (found,) = create_feature_extractor(model, [eval_nodes[-1]]).eval()(x).values()
        torch.testing.assert_close(found, model(x))
    trained = create_feature_extractor(model, [train_nodes[-1]]).train()
    (output,) = trained(x).values()
    output.mean().backward()
    assert all(p.grad is not None for p in trained.parameters())


def test_intermediates_in_both_layouts():
    model = small("sret_t")
    x = images(model, 2)
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        nhwc = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(last, maps[-1])
    for one, other in zip(maps, nhwc, strict=True):
        torch.testing.assert_close(one, other.permute(0, 3, 1, 2))


def test_permutations_are_constants_of_an_exported_graph():
    model = SReT(small_config()).eval()
    x = images(model, 2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.index_select.default" in called
    assert not any("sort" in name or "topk" in name for name in called)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tracing_and_compiling_for_any_size():
    model = SReT(small_config()).eval()
    x, wide = images(model, 2), torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(wide), model(wide))
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(model, (x,), dynamic_shapes=(sizes,)).module()
    torch.testing.assert_close(exported(wide), model(wide))


def test_maps_of_the_stem_come_first_where_asked_for():
    plain = small("sret_t", features_only=True)
    options = {"features_only": True, "stem_features": True}
    model = small("sret_t", **options)
    model.load_state_dict(plain.state_dict())
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    x = images(model.model, 2)
    with torch.no_grad():
        found, stages = model(x), plain(x)
        nhwc = model.model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    assert [tuple(y.shape[1:]) for y in found[:2]] == [(32, 32, 32), (64, 16, 16)]
    assert [tuple(y.shape[1:]) for y in nhwc[:2]] == [(32, 32, 32), (16, 16, 64)]
    assert model.feature_info.channels() == [y.shape[1] for y in found]
    for one, other in zip(found[2:], stages, strict=True):
        assert torch.equal(one, other)
    stem = model.model.stem
    torch.testing.assert_close(found[0], stem.bn1(stem.conv1(x)).relu())
    torch.testing.assert_close(found[1], stem.bn2(stem.conv2(found[0])).relu())


@pytest.mark.parametrize(("stride", "reductions"), [(8, [2, 4, 8]), (4, [2, 4, 8]), (2, [2, 4, 8]), (1, [1, 2, 4])])
def test_maps_of_the_stem_have_a_resolution_of_their_own(stride, reductions):
    options = {"features_only": True, "stem_features": True, "stem_stride": stride, "img_size": 32}
    model = timm.create_model("sret_t_unsliced", **options)
    assert model.feature_info.reduction()[:3] == reductions
    x = torch.randn(1, 3, 32, 32)
    assert [32 // y.shape[2] for y in model(x)][:3] == reductions
    first = timm.create_model("sret_t_unsliced", **options, out_indices=(0,))
    assert torch.equal(first.eval()(x)[0], first.model.forward_intermediates(x, [0], intermediates_only=True)[0])
    assert len(first.model.stages) == 1


def test_maps_of_the_stem_are_given_by_one_kind_of_extractor():
    with pytest.raises(InputError, match="stem_features needs feature_cls 'getter', not 'hook'"):
        small("sret_t", features_only=True, stem_features=True, feature_cls="hook")


def test_a_name_can_stand_for_options():
    sret.registry.register("sret_grey", "sret_t", in_chans=1, img_size=96, stages=SReT(small_config()).config.stages)
    try:
        model = timm.create_model("sret_grey", num_classes=3)
        assert (model.in_chans, model.config.img_size, len(model.stages)) == (1, (96, 96), 3)
        assert model.num_classes == 3
        assert timm.create_model("sret_grey", features_only=True, stem_features=True).feature_info.channels()[0] == 8
    finally:
        timm.models._registry._model_entrypoints.pop("sret_grey")
        timm.models._registry._module_to_models["registry"].discard("sret_grey")
    with pytest.raises(InputError, match="did you mean 'sret_t'"):
        sret.registry.register("mine", "sret_tt")
    with pytest.raises(InputError, match="'a/b' is not a name for timm"):
        sret.registry.register("a/b", "sret_t")


def penalty(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The squared norm of the gradient of the images, as a function of the weights."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return grad.square().sum()


@pytest.mark.parametrize("permutation", ["random", "strided"])
def test_second_derivatives_without_fused_attention(permutation):
    model = SReT(small_config(permutation=permutation)).double().eval()
    x = images(model).double()
    with pytest.raises(RuntimeError, match=r"call timm\.layers\.set_fused_attn\(False\)"):
        penalty(model, x)
    fused = model(x)
    set_fused_attn(False)
    try:
        torch.testing.assert_close(model(x), fused)
        penalty(model, x).backward()
        weight = model.stages[1].recursions[0].block.attn.branch.qkv.weight
        direction, numbers = torch.randn_like(weight), []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight.add_(direction, alpha=step)
            numbers.append(penalty(model, x).item())
            with torch.no_grad():
                weight.sub_(direction, alpha=step)
    finally:
        set_fused_attn(True)
    torch.testing.assert_close(
        (weight.grad * direction).sum().item(), (numbers[0] - numbers[1]) / 2e-5, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(("memory", "reversible"), [("pass", False), ("reversible", True)])
def test_second_derivatives_of_recomputed_passes_are_refused(memory, reversible):
    model = SReT(small_config(memory=memory, reversible=reversible))
    with pytest.raises(RuntimeError, match="use memory 'none'"):
        penalty(model, images(model))


def test_permutations_of_training_obey_the_seed():
    model = SReT(small_config()).train()
    model.stem.eval()
    x = images(model, 2)

    def after(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(x)

    first = after(1)
    assert not torch.equal(model(x), first)
    assert torch.equal(after(1), first)
    assert not torch.equal(after(2), first)


def test_a_checkpointed_stage_repeats_its_permutations():
    """`torch.utils.checkpoint` restores the state of torch's generator before it computes a stage again."""
    model = SReT(small_config()).double().train()
    x, grads = images(model, 2).double(), []
    for is_checkpointed in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        tokens = model.pos_embed(model.stem(x))
        for stage in model.stages:
            tokens = checkpoint(stage, tokens, use_reentrant=False) if is_checkpointed else stage(tokens)
        model.forward_head(tokens).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_device_dtype_and_pooling_are_options():
    model = small("sret_t", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    model = small("sret_t", global_pool="max")
    x = images(model)
    with torch.no_grad():
        maps = model.forward_features(x)
        torch.testing.assert_close(model(x), model.head(model.norm(maps.amax((2, 3)))))


def test_set_input_size_resizes_the_position_embedding():
    torch.manual_seed(1)
    model = small("sret_t")
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        before = model(x)
        model.set_input_size((96, 64))
        assert model.pos_embed.weight.shape[-2:] == (12, 8)
        torch.testing.assert_close(model(x), before)
    assert model.config.input_size == (96, 64)


def test_a_model_saved_for_the_hub_is_created_again(tmp_path):
    model = small("sret_t")
    save_for_hf(model, tmp_path)
    for options in ({}, {"img_size": 96}, {"num_classes": 5}, {"in_chans": 1}, {"features_only": True}):
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **options)
        block = "stages.1.recursions.0.block.mlp.branch.fc1.weight"
        found = next(value for key, value in again.state_dict().items() if key.endswith(block))
        assert torch.equal(found, model.state_dict()[block]), options


@pytest.mark.parametrize("make", ["config", "load", "create"])
def test_any_model_is_saved_for_the_hub_and_created_again(tmp_path, make):
    config = small_config(in_chans=1, img_size=(64, 96), permutation="strided")
    model = SReT(config)
    if make == "load":
        preprocessing = Preprocessing(img_size=(64, 96), mean=(0.1,), std=(0.3,))
        save_weights(tmp_path / "m.safetensors", model.state_dict(), Card(config=config, preprocessing=preprocessing))
        model = sret.load(tmp_path / "m.safetensors")
    elif make == "create":
        model = timm.create_model("sret_s", **{k: v for k, v in config.to_dict().items() if k != "memory"})
        model.set_input_size(48)
    save_for_hf(model.eval(), tmp_path / "hub")
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert again.config == model.config
    if make == "load":
        assert again.pretrained_cfg["mean"] == [0.1]
    x = images(model)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_the_cfg_of_a_loaded_model_is_that_of_its_card(tmp_path):
    config = small_config(in_chans=1, img_size=32)
    assert resolve_data_config({}, model=SReT(config))["input_size"] == (1, 32, 32)
    preprocessing = Preprocessing(img_size=(32, 32), mean=(0.1,), std=(0.3,), crop_pct=1.0, interpolation="bilinear")
    names = tuple(f"class {k}" for k in range(10))
    path = tmp_path / "grey.safetensors"
    save_weights(path, SReT(config).state_dict(), Card(config=config, preprocessing=preprocessing, class_names=names))
    model = sret.load(path)
    found = resolve_data_config({}, model=model)
    assert (found["input_size"], found["mean"], found["std"]) == ((1, 32, 32), (0.1,), (0.3,))
    assert (found["crop_pct"], found["interpolation"]) == (1.0, "bilinear")
    assert model.pretrained_cfg["label_names"] == names


def test_any_module_can_be_the_first_import():
    """Registering imports only modules that do not import timm, so that none of them can be half-imported then."""
    find = "import sys, sret, timm; print(*{m for m in sys.modules if m.startswith('sret.')} - {'sret.registry'})"
    found = processes.run([sys.executable, "-c", find]).stdout.split()
    assert "sret.models.variants" in found
    code = "import sys, sret; sys.modules['timm'] = None\nfor name in sys.argv[1:]: __import__(name)"
    done = processes.run([sys.executable, "-c", code, *found])
    assert not done.returncode, done.stderr
