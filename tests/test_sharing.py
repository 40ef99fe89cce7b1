"""Hundreds of passes over few weights: what saves, compiles or exports a model holds each weight and each pass once.

That is what often breaks: a file repeats what is shared, a compiler unrolls, an exporter folds a weight once per pass.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread

import onnx
import pytest
import torch
from onnxscript.rewriter.rules.common import slice_split_rule
from test_export import card_of, disturbed
from torch import Tensor, fx

from sret import SReT
from sret.checkpoints.card import save_weights
from sret.export import export as exporting
from sret.export.export import export_model
from sret.export.onnx import to_onnx
from sret.layers.recursion import CompiledPass
from sret.models.config import ModelConfig
from sret.models.deep import deep_config
from sret.models.fuse import fuse
from sret.models.stage_config import StageConfig
from sret.models.variants import DEEP
from sret.training.optim import make_ema

HUNDRED = DEEP["sret_deep_108_32"]


def deep(layers: int, **changes: object) -> ModelConfig:
    """So many layers for 32-pixel images, as `DEEP` has them; like those with 2.5 million parameters at most."""
    size = {"embed_dim": 32, "img_size": 32, "stem_stride": 4, "num_classes": 10}
    return replace(deep_config(layers=layers, max_parameters=2_500_000, **size), **changes)


def num_bytes(model: torch.nn.Module) -> int:
    """Of parameters and buffers, which torch counts once however often they are shared."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


# files and copies ----------------------------------------------------------------------------------------------------


def ema(model: SReT) -> SReT:
    average = make_ema(model, decay=0.99)
    average.update(model, step=1)
    return average.module


@pytest.mark.parametrize(
    "derived", [lambda model: model, copy.deepcopy, ema, fuse], ids=["model", "copy", "ema", "fused"]
)
def test_a_weights_file_holds_each_tensor_once_and_little_else(derived: Callable[[SReT], SReT], tmp_path: Path):
    model = SReT(HUNDRED)
    found = derived(model)
    tensors = found.state_dict()
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)
    assert len(tensors) == len([*found.parameters(), *found.buffers()])
    if found is not model:
        assert not {t.data_ptr() for t in tensors.values()} & {t.data_ptr() for t in model.state_dict().values()}
    save_weights(tmp_path / "weights.safetensors", tensors, card_of(found))
    content = (tmp_path / "weights.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert len(content) == 8 + header + num_bytes(found)


@pytest.mark.parametrize("derived", [SReT, lambda config: fuse(SReT(config))], ids=["model", "fused"])
def test_more_passes_add_projections_and_nothing_else(derived: Callable[[ModelConfig], SReT]):
    few, many = (derived(config).state_dict() for config in (deep(20), HUNDRED))
    shared = {key for key in few if "projections" not in key}
    assert shared == {key for key in many if "projections" not in key}
    assert all(few[key].shape == many[key].shape for key in shared)


# compiled ------------------------------------------------------------------------------------------------------------

KINDS = {"none": 1, "nested": 1, "reversible": 3}  # what is compiled of a pass: all of it, or three changes of a stream


class Backend:
    """Runs graphs as they are, and counts their nodes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        self.sizes.append(len(graph.graph.nodes))
        return graph.forward


def graphs_of(passes: int, memory: str, use: Callable[[SReT], None]) -> list[int]:
    """How many nodes the graphs have that are compiled while a model of one stage with two blocks is used."""
    torch._dynamo.reset()
    stages = (StageConfig(embed_dim=16, num_heads=1, num_blocks=2, groups=(1,) * passes),)
    model, backend = SReT(deep(20, stages=stages, memory=memory, reversible=memory == "reversible")), Backend()
    model.compile(backend=backend, fullgraph=True)
    use(model)
    return backend.sizes


@pytest.fixture
def new_process(monkeypatch):
    """torch's limits as they are at first, but that a pass beyond them is an error: else it runs uncompiled."""
    monkeypatch.setattr(CompiledPass, "max_graphs", 0)
    limits = {"recompile_limit": 8, "accumulated_recompile_limit": 256, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limits):
        yield
    torch._dynamo.reset()


def loss(model: SReT) -> Tensor:
    return model.train()(torch.randn(4, 3, 32, 32)).square().sum()


def train_and_evaluate(model: SReT) -> None:
    """Two steps and two evaluations, the last of fewer images."""
    for batch_size in (4, 3):
        loss(model).backward()
        with torch.no_grad():
            model.eval()(torch.randn(batch_size, 3, 32, 32))


@pytest.mark.usefixtures("new_process")
@pytest.mark.parametrize("memory", [pytest.param("none", marks=pytest.mark.slow), "nested", "reversible"])
def test_graphs_do_not_grow_with_passes(memory: str):
    few, many = (graphs_of(passes, memory, train_and_evaluate) for passes in (3, 30))
    assert few == many
    assert len(many) == KINDS[memory] * 3  # with gradients, without them, and for the smaller batch


@pytest.mark.usefixtures("new_process")
@pytest.mark.parametrize("memory", ["nested", "reversible"])
def test_passes_are_compiled_in_whatever_thread_backward_runs(memory: str):
    """On a GPU it has a thread of its own, and the limit of recompilation is a thread's."""

    def aside(model: SReT) -> None:
        value = loss(model)
        thread = Thread(target=value.backward)
        thread.start()
        thread.join()

    together = graphs_of(3, memory, lambda model: loss(model).backward())
    assert graphs_of(3, memory, aside) == together
    assert len(together) == KINDS[memory] * 2


@pytest.mark.usefixtures("new_process")
def test_a_model_has_room_for_its_graphs_whatever_was_compiled_before():
    """All models share the graphs of a pass, and so the limit of their number: 8 at first."""
    stage, backend = StageConfig(embed_dim=16, num_heads=1, num_blocks=1, groups=(1,)), Backend()
    for count in range(1, 10):
        stages = (replace(stage, mlp_ratio=float(count)),)
        model = SReT(deep(5, stages=stages, memory="none")).eval()
        model.compile(backend=backend, fullgraph=True)
        with torch.no_grad():
            model(torch.zeros(1, 3, 32, 32))
        assert len(backend.sizes) == count


# exported ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("derived", [lambda model: model, fuse], ids=["model", "fused"])
def test_an_exported_program_holds_each_weight_once(derived: Callable[[SReT], SReT]):
    model = derived(SReT(deep(20)).eval())
    with torch.no_grad():
        program = torch.export.export(model, (torch.zeros(2, 3, 32, 32),))
    expected = model.state_dict()
    assert program.state_dict.keys() == expected.keys()
    assert len({tensor.data_ptr() for tensor in program.state_dict.values()}) == len(expected)
    assert not program.constants
    inputs = [spec.target for spec in program.graph_signature.input_specs if spec.target is not None]
    assert len(inputs) == len(set(inputs))
    assert set(inputs) <= expected.keys()


@pytest.mark.slow
@pytest.mark.parametrize("layers", [11, 108])
def test_an_engine_file_holds_each_weight_once(layers: int, tmp_path: Path, monkeypatch):
    model = disturbed(deep(layers))  # no two weights are equal by chance
    # The time of a rule for two nodes, which is tried on all pairs, grows with the square of the number of passes.
    monkeypatch.setattr(slice_split_rule, "try_rewrite", lambda *_, **__: pytest.fail("all pairs of nodes compared"))
    graph = to_onnx(model, (3, 32, 32))
    monkeypatch.setattr(exporting, "to_onnx", lambda *_: onnx.ModelProto.FromString(graph.SerializeToString()))
    paths = [tmp_path / "m.onnx", tmp_path / "m.xml"]
    for path in paths:
        export_model(model, card_of(model), path)
    weights = num_bytes(fuse(model))
    tensors = [tensor.raw_data for tensor in onnx.load(paths[0]).graph.initializer]
    held = sum(map(len, tensors))
    assert len(set(tensors)) == len(tensors)
    assert weights == pytest.approx(held, abs=1000)
    names = 10_000 * layers + 1_000  # names of nodes and of what passes between them; the digest
    assert paths[0].stat().st_size <= held + names
    assert paths[1].with_suffix(".bin").stat().st_size == pytest.approx(weights, abs=1000)
