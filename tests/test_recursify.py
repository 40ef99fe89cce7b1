"""Recursive models made of others: small random members of every family of vision transformers."""

import copy
import math
from collections.abc import Callable

import onnx
import onnx_ir.passes.common
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_model, save_model
from timm.models import convmixer, mlp_mixer, pit, tiny_vit
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

from sret import InputError, recursify
from sret.layers import NonLinearProjection
from sret.models.recursify.runs import find_runs
from sret.models.recursify.sharing import groups_of
from sret.models.recursify.slicing import Slicing, attention_in_slices

PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
WINDOWS = {
    "img_size": 32,
    "window_size": 2,
    "embed_dim": 16,
    "depths": (2, 4),
    "num_heads": (1, 2),
    "num_classes": 5,
    "drop_path_rate": 0.0,
}
MIXER = {"img_size": 32, "patch_size": 8, "num_blocks": 4, "embed_dim": 32, "num_classes": 5}


class Encoder(nn.Module):
    """A classifier of torch's own parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 8, 8)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(x).flatten(2).mT).mean(1))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "ViT": lambda: timm.create_model("vit_tiny_patch16_224", **PLAIN),
    "DeiT": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **PLAIN),
    "DeiT III": lambda: timm.create_model("deit3_small_patch16_224", **PLAIN),
    "BEiT": lambda: timm.create_model("beit_base_patch16_224", **PLAIN),
    "EVA-02": lambda: timm.create_model("eva02_tiny_patch14_224", **PLAIN),
    "DINOv2": lambda: timm.create_model("vit_small_patch14_reg4_dinov2", **PLAIN),
    "DINOv3": lambda: timm.create_model("vit_small_patch16_dinov3", **PLAIN),
    "CaiT": lambda: timm.create_model("cait_xxs24_224", **PLAIN),
    "XCiT": lambda: timm.create_model("xcit_nano_12_p8_224", **{**PLAIN, "num_heads": 4}),
    "Swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", **WINDOWS),
    "Swin v2": lambda: timm.create_model("swinv2_tiny_window8_256", **WINDOWS),
    "PVT v2": lambda: timm.create_model(
        "pvt_v2_b0", depths=(2, 2, 4, 2), embed_dims=(8, 16, 16, 16), num_heads=(1, 2, 2, 2), num_classes=5
    ),
    "PiT": lambda: pit.PoolingVisionTransformer(
        img_size=32, patch_size=8, stride=4, base_dims=(8, 8, 8), depth=(2, 4, 2), heads=(1, 2, 4), num_classes=5
    ),
    "TinyViT": lambda: tiny_vit.TinyVit(
        depths=(2, 2, 4, 2), embed_dims=(8, 16, 16, 16), num_heads=(1, 2, 2, 2), window_sizes=(2,) * 4, num_classes=5
    ),
    "Mixer": lambda: mlp_mixer.MlpMixer(**MIXER),
    "ResMLP": lambda: mlp_mixer.MlpMixer(**MIXER, mlp_ratio=4, block_layer=mlp_mixer.ResBlock),
    "ConvMixer": lambda: convmixer.ConvMixer(dim=16, depth=4, kernel_size=3, patch_size=8, num_classes=5),
    "ConvNeXt": lambda: timm.create_model("convnext_atto", depths=(2, 2, 4, 2), dims=(8, 16, 16, 16), num_classes=5),
    "torch": Encoder,
}
IMAGES, LABELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 3])


@pytest.fixture(params=FAMILIES)
def model(request) -> nn.Module:
    """With random weights everywhere: what begins as zeros or ones would hide mistakes."""
    model = FAMILIES[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def numbers(model: nn.Module, names: tuple[str, ...]) -> int:
    return sum(count(model.get_submodule(name)) for name in names)


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    return model(IMAGES)


def test_the_default_changes_nothing(model):
    assert torch.equal(output(recursify(model)), output(model))


def test_all_runs_are_found(model):
    runs = find_runs(model)
    assert runs
    for run in runs:
        assert len({numbers(model, unit) for unit in run.units}) == 1
    names = [name for run in runs for unit in run.units for name in unit]
    assert len(names) == len(set(names))


def test_shared_weights_are_stored_once_and_the_model_given_stays(model, tmp_path):
    before = copy.deepcopy(model.state_dict())
    expected = count(model)
    for run in find_runs(model):
        expected -= numbers(model, run.units[0]) * (len(run.units) // 2)
    shared = recursify(model, passes=2)
    assert count(shared) == expected
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert shared.state_dict().keys() == before.keys()
    for run in find_runs(model):
        for first, second in zip(run.units[::2], run.units[1::2], strict=True):
            for a, b in zip(first, second, strict=True):
                kept, tied = shared.get_submodule(a).state_dict(), shared.get_submodule(b).state_dict()
                learned = dict(shared.get_submodule(a).named_parameters())
                assert all(torch.equal(tied[name], kept[name]) for name in learned)
    save_model(shared, str(tmp_path / "shared.safetensors"))
    assert (tmp_path / "shared.safetensors").stat().st_size < 4 * expected + 40_000
    again = recursify(model, passes=2)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    load_model(again, str(tmp_path / "shared.safetensors"))
    assert torch.equal(output(again), output(shared))


def test_a_correction_of_full_rank_is_the_original(model):
    runs = find_runs(model)
    for init in ("first", "mean"):
        rank = max(min(p.flatten(1).shape) for run in runs for p in block_matrices(model, run.units[0]))
        found = recursify(model, passes=2, init=init, rank=rank)
        torch.testing.assert_close(output(found), output(model), atol=1e-5, rtol=1e-5)
    errors = [(output(recursify(model, passes=2, init="mean", rank=r)) - output(model)).norm() for r in (0, rank)]
    assert errors[1] < 0.01 * errors[0]


def block_matrices(model: nn.Module, names: tuple[str, ...]) -> list[torch.Tensor]:
    found = [p for name in names for p in model.get_submodule(name).parameters() if p.ndim >= 2]
    return [p[0] if p.ndim > 2 and p.shape[0] == 1 else p for p in found]


def test_extra_passes_begin_as_the_identity_and_learn(model):
    for damping in (False, True):
        deep = recursify(model, extra_passes=2, damping=damping, scale=True)
        torch.testing.assert_close(output(deep), output(model), atol=1e-6, rtol=1e-6)
        blocks = sum(len(unit) for run in find_runs(model) for unit in run.units)
        assert count(deep) == count(model) + 3 * blocks
    assert deep.state_dict().keys() > model.state_dict().keys()
    deep.train()
    cross_entropy(logits_of(deep), LABELS).backward()
    missing = [name for name, p in deep.named_parameters() if p.grad is None]
    cross_entropy(logits_of(model.train()), LABELS).backward()
    assert missing == [name for name, p in model.named_parameters() if p.grad is None]
    gates = [p for name, p in deep.named_parameters() if name.endswith("pass_gates")]
    assert all(gate.grad.abs().min() > 0 for gate in gates)


def logits_of(model: nn.Module) -> torch.Tensor:
    found = model(IMAGES)
    return found[0] if isinstance(found, tuple) else found


def test_an_extra_pass_is_the_block_again():
    model = FAMILIES["ViT"]().eval()
    deep = recursify(model, extra_passes=1, damping=True)
    with torch.no_grad():
        for name, parameter in deep.named_parameters():
            if name.endswith("pass_gates"):
                parameter.fill_(0.6)
        x = torch.randn(1, 17, 32)
        once = model.blocks[1](x)
        torch.testing.assert_close(deep.blocks[1](x), once + 0.3 * (model.blocks[1](once) - once))


class Masked(TorchFunctionMode):
    """Attention with a mask that allows what slices allow."""

    def __init__(self, num_groups: int, prefix: int, is_strided: bool) -> None:
        super().__init__()
        self.settings = num_groups, prefix, is_strided

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        num_groups, prefix, is_strided = self.settings
        tokens = torch.arange(args[0].shape[2] - prefix)
        group = tokens % num_groups
        if not is_strided:
            parts = tokens.tensor_split(num_groups)
            group = torch.cat([torch.full_like(part, g) for g, part in enumerate(parts)])
        allowed = torch.ones(2 * (len(tokens) + prefix,), dtype=torch.bool)
        allowed[prefix:, prefix:] = group[:, None] == group
        bias = torch.where(allowed, 0.0, -torch.inf)
        if kwargs.get("attn_mask") is not None:
            bias = bias + kwargs["attn_mask"]
        return func(*args, **{**kwargs, "attn_mask": bias})


@pytest.mark.parametrize("family", ["ViT", "DeiT", "DeiT III", "BEiT", "EVA-02", "DINOv2", "DINOv3"])
@pytest.mark.parametrize("num_groups", [2, 4, 5, 16])
def test_slices_are_attention_with_a_mask(family, num_groups):
    model = made(family, {})
    sliced, twice = (
        recursify(model, **o) for o in ({"slices": (num_groups,)}, {"passes": 2, "slices": (1, num_groups)})
    )
    x = torch.randn(2, 16 + model.num_prefix_tokens, 32)
    for i, (net, is_strided) in enumerate(((sliced, False), (twice, True))):
        attention, same = net.blocks[i].attn, model.blocks[i].attn
        same.load_state_dict(attention.state_dict())
        arguments = {}
        if family.startswith(("EVA", "DINOv3")):
            arguments["rope"] = model.rope.get_embed((4, 4))[0] if family == "DINOv3" else model.rope.get_embed()
        with torch.no_grad():
            found = attention(x, **arguments)
            with Masked(num_groups, model.num_prefix_tokens, is_strided):
                expected = same(x, **arguments)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(found, same(x, **arguments), atol=1e-4)


def test_masks_of_every_shape_are_sliced_too():
    q, k, v = torch.randn(3, 2, 3, 10, 8).unbind()
    for shape in ((10, 10), (1, 10, 10), (2, 1, 1, 10), (2, 3, 10, 10)):
        for mask in (torch.randn(shape), torch.rand(shape) < 0.8):
            allowed = mask if mask.dtype == torch.bool else torch.ones(shape, dtype=torch.bool)
            allowed = allowed | torch.eye(10, dtype=torch.bool)  # every query sees a key
            mask = allowed if mask.dtype == torch.bool else mask
            found = attention_in_slices(Slicing(3, 1, True), q, k, v, attn_mask=mask)
            with Masked(3, 1, True):
                bias = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
                expected = scaled_dot_product_attention(q, k, v, attn_mask=bias)
            torch.testing.assert_close(found, expected)


def test_what_cannot_be_sliced_is_one_line():
    with pytest.raises(InputError, match=r"slices are \(4,\); give one number for each pass, and passes is 2"):
        recursify(FAMILIES["ViT"](), passes=2, slices=(4,))
    for family in ("Mixer", "Swin", "ConvNeXt"):
        with pytest.raises(InputError, match="cannot be sliced"):
            recursify(FAMILIES[family](), slices=(2,))
    with pytest.raises(InputError, match="16 token"):
        recursify(FAMILIES["ViT"](), slices=(17,))(IMAGES)


@pytest.mark.parametrize("family", ["ViT", "EVA-02", "CaiT", "Swin", "PVT v2", "Mixer", "torch"])
def test_projections_begin_as_the_identity_and_learn(family):
    model = made(family, {})
    deep = recursify(model, passes=2, extra_passes=1, projection=True)
    shared = recursify(model, passes=2)
    torch.testing.assert_close(output(deep), output(shared), atol=1e-6, rtol=1e-6)
    cross_entropy(deep(IMAGES), LABELS).backward()
    assert all(p.grad is not None for name, p in deep.named_parameters() if "pass_projections" in name)
    last = [p.grad.abs().max() for name, p in deep.named_parameters() if ".0.branch.fc2.weight" in name]
    assert min(last) > 0
    places = [m.branch.fc1.weight for m in deep.modules() if isinstance(m, NonLinearProjection)]
    assert len(set(map(id, places))) == len(places) == 2 * sum(len(u) for run in find_runs(model) for u in run.units)


def test_projections_need_channels_in_the_last_axis():
    with pytest.raises(InputError, match="cannot have projections"):
        recursify(FAMILIES["ConvMixer"](), projection=True)
    with pytest.raises(InputError, match="channels last"):
        recursify(FAMILIES["ConvNeXt"](), projection=True)(IMAGES)


@pytest.mark.parametrize(
    ("passes", "share", "expected"),
    [
        (2, "sequence", [[0, 1], [2, 3], [4, 5]]),
        (3, "cycle", [[0, 2, 4], [1, 3, 5]]),
        (2, "middle", [[0], [1, 2], [3, 4], [5]]),
    ],
)
def test_groups_of_shared_units(passes, share, expected):
    assert groups_of(6, passes, share) == expected


def test_extra_passes_can_follow_corrections():
    model = recursify(made("ViT", {}), passes=2, rank=4)
    torch.testing.assert_close(output(recursify(model, extra_passes=1)), output(model))


def test_swin_shares_plain_and_shifted_blocks_as_pairs():
    runs = find_runs(FAMILIES["Swin"]())
    assert [run.units for run in runs] == [
        (("layers.1.blocks.0", "layers.1.blocks.1"), ("layers.1.blocks.2", "layers.1.blocks.3"))
    ]


def test_what_cannot_be_shared_is_one_line():
    model = FAMILIES["ViT"]()
    with pytest.raises(InputError, match=r"blocks \(4 blocks\): passes=3 does not divide 4; passes can be 2 or 4"):
        recursify(model, passes=3)
    with pytest.raises(InputError, match=r"does not divide the 2 between the first and the last; passes can be 2"):
        recursify(model, passes=3, share="middle")
    with pytest.raises(InputError, match=r"rank is 99, .* use at most 32"):
        recursify(model, passes=2, rank=99)
    with pytest.raises(InputError, match="no sequence of equal blocks"):
        recursify(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), passes=2)
    with pytest.raises(InputError, match="no container 'body' of equal blocks; there is blocks"):
        recursify(model, passes=2, parts=("body",))
    with pytest.raises(InputError, match="no option 'pases'; did you mean 'passes'"):
        recursify(model, pases=2)
    with pytest.raises(InputError, match=r"leave it out: parts=\('blocks',\)"):
        recursify(FAMILIES["CaiT"](), passes=4)
    recursify(FAMILIES["CaiT"](), passes=4, parts="blocks")
    with pytest.raises(InputError, match="are one weight already"):
        recursify(recursify(model, passes=2), passes=2)
    for options in ({"rank": 2}, {"share": "cycle"}, {"init": "mean"}, {"damping": True}):
        with pytest.raises(InputError, match=f"{next(iter(options))} has no effect without"):
            recursify(model, **options)
    with pytest.raises(InputError, match="have extra passes or scales already"):
        recursify(recursify(model, extra_passes=1), scale=True)
    with pytest.raises(InputError, match="takes a module, not str"):
        recursify("vit_tiny_patch16_224")
    with pytest.raises(InputError, match="of the Blocks is sliced already"):
        recursify(recursify(model, slices=(2,)), slices=(4,))
    with pytest.raises(InputError, match="slices is None; it must be a list of whole numbers"):
        recursify(model, slices=None)
    # Of the other stages only the last has a number of blocks that 2 divides.
    stages = nn.Sequential(*(nn.Sequential(*(mlp(width) for _ in range(n))) for width, n in ((2, 3), (4, 5), (6, 4))))
    with pytest.raises(InputError, match=r"leave it out: parts=\('2',\)$"):
        recursify(stages, passes=2)
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    with pytest.raises(InputError, match="is frozen in some of the blocks"):
        recursify(model, passes=2)
    model.blocks[0].forward = model.blocks[0].forward
    with pytest.raises(InputError, match="was replaced"):
        recursify(model, extra_passes=1)


def mlp(width):
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))


def test_weights_of_other_kinds_are_refused():
    lazy = nn.Sequential(*(nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(4)) for _ in range(2)))
    with pytest.raises(InputError, match=r"0.0.weight has no shape yet; run the model once first"):
        recursify(lazy, passes=2)
    broken = nn.Sequential(mlp(4), mlp(4))
    nn.init.constant_(broken[1][0].weight, math.nan)
    with pytest.raises(InputError, match=r"0.weight of a block has values that are not finite"):
        recursify(broken, passes=2, rank=1)
    pruned = nn.Sequential(mlp(4), mlp(4))
    for block in pruned:
        prune.l1_unstructured(block[0], "weight", 0.5)
    with pytest.raises(InputError, match=r"computed before each call; first remove masks with torch.nn.utils.prune"):
        recursify(pruned, extra_passes=1)

    class Packed(nn.Linear):  # as in quantized layers, the state dict has weights that are no parameters
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}packed"] = torch.zeros(1)

    packed = nn.Sequential(*(nn.Sequential(Packed(4, 4), nn.Linear(4, 4)) for _ in range(2)))
    with pytest.raises(InputError, match=r"0.0.packed is no parameter, .*; share before quantizing"):
        recursify(packed, passes=2)


def test_inference_mode_leaves_parameters_that_can_be_trained():
    with torch.inference_mode():
        model = recursify(FAMILIES["ViT"]().eval(), IMAGES.clone(), passes=2, rank=2, share="similar", init="closest")
    model(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weights_tied_within_a_block_stay_tied():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(4)))
    for block in model:
        block[1].weight = block[0].weight
    assert count(recursify(model, passes=2)) == count(model) // 2


OPTIONS = {
    "shared": {"passes": 2},
    "corrected": {"passes": 2, "rank": 2},
    "deep": {"extra_passes": 1, "scale": True},
}
SLICED = {"passes": 2, "slices": (4, 2), "scale": True}


def test_all_corrections_learn():
    for init in ("first", "mean"):
        model = recursify(FAMILIES["ViT"](), passes=2, rank=2, init=init)
        cross_entropy(model(IMAGES), LABELS).backward()
        factors = {n: p for n, p in model.named_parameters() if n.endswith(("left", "right"))}
        assert len(factors) == 2 * 4 * 4  # blocks, matrices
        learning = [name for name, p in factors.items() if p.grad.abs().max() > 0]
        pairs = {name.rpartition(".")[0] for name in learning}
        assert pairs == {name.rpartition(".")[0] for name in factors}


def test_batch_norm_of_extra_passes_changes_no_statistics():
    model = made("ConvMixer", {})
    deep = recursify(model, extra_passes=2)
    for net in (model, deep):
        net.train()
        for _ in range(3):
            net(IMAGES)
        net.eval()
    assert torch.equal(output(deep), output(model))


@pytest.mark.parametrize("options", [{"extra_passes": 1, "scale": True}, {"passes": 2, "rank": 2, "scale": True}])
def test_autocast(model, options):
    deep = recursify(model, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert output(deep).isfinite().all()


def test_models_with_replaced_classes_are_pickled(tmp_path):
    for options in (SLICED, {"extra_passes": 1}):
        model = made("ViT", options)
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(output(again), output(model))


def test_a_block_called_by_keyword_runs_again():
    class Net(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self:
                x = block(src=x)
            return x

    net = Net(*(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(2))).eval()
    x = torch.randn(1, 3, 8)
    deep = recursify(net, extra_passes=1)
    with torch.no_grad():
        for name, parameter in deep.named_parameters():
            if "gates" in name:
                parameter.fill_(1.0)
        twice = nn.Sequential(net[0], net[0], net[1], net[1]).eval()
        torch.testing.assert_close(deep(x), twice(x))


def made(family: str, options: dict) -> nn.Module:
    model = recursify(FAMILIES[family]().eval(), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", ["ViT", "Swin", "ConvNeXt"])
def test_copies_and_states_compute_the_same(family, options):
    model = made(family, options)
    expected = output(model)
    assert torch.equal(output(copy.deepcopy(model)), expected)
    again = made(family, options)
    again.load_state_dict(model.state_dict())
    assert torch.equal(output(again), expected)


SLOW = pytest.mark.slow
COMPILED = [
    *(pytest.param("ViT", options) for options in (*OPTIONS.values(), SLICED)),
    pytest.param("EVA-02", SLICED, marks=SLOW),
    *(pytest.param(name, o, marks=SLOW) for name in ("EVA-02", "Swin", "Mixer") for o in OPTIONS.values()),
]


@pytest.mark.parametrize(("family", "options"), COMPILED)
def test_compiled_and_exported_models_compute_the_same(family, options):
    model = made(family, options)
    expected = output(model)
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(output(compiled), expected)
    exported = torch.export.export(model, (IMAGES,))
    torch.testing.assert_close(output(exported.module()), expected)


@pytest.mark.slow
def test_an_onnx_file_holds_shared_weights_once(tmp_path):
    model = recursify(FAMILIES["ViT"]().eval(), passes=4)
    program = torch.onnx.export(model, (IMAGES,), dynamo=True)
    onnx_ir.passes.common.DeduplicateInitializersPass(size_limit=2**40)(program.model)
    program.save(tmp_path / "model.onnx")
    initializers = onnx.load(tmp_path / "model.onnx").graph.initializer
    assert sum(math.prod(tensor.dims) for tensor in initializers) < 1.01 * count(model)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), output(model), atol=1e-4, rtol=1e-4)
