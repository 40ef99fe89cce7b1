"""Training with a CUDA graph. Here a graph is a stand-in that repeats a call on a CPU, at fixed places in memory."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_train import RECIPE, weights
from torch import Tensor, nn

from sret import InputError, SReT
from sret.checkpoints.card import Card, save_weights
from sret.data.preprocess import Preprocessing
from sret.kernels.cuda_graph import WARM_UP, GraphedGradients
from sret.layers.permutation import Permuter, StaticPermuter
from sret.training import distributed
from sret.training.config import Distillation, RuntimeConfig
from sret.training.loop import train
from sret.training.setup import create

pytestmark = pytest.mark.usefixtures("quick_report")

CPU = torch.device("cpu")
GREY = Preprocessing(img_size=(16, 16), mean=(0.5,), std=(0.5,))


class StandIn:
    """Changes nothing when it is recorded, as a graph, and later writes outputs and gradients to the same memory."""

    def __init__(self, parameters: Sequence[nn.Parameter], model: nn.Module) -> None:
        self.parameters, self.model, self.replays = parameters, model, 0

    def __call__(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        assert all(parameter.grad is None for parameter in self.parameters)
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with torch.random.fork_rng():
            outputs = function()
        for buffer, value in buffers:
            buffer.copy_(value)
        gradients = [parameter.grad for parameter in self.parameters]
        for tensor in (*outputs, *gradients):
            if tensor is not None:
                tensor.fill_(torch.nan)

        def replay() -> None:
            self.replays += 1
            if isinstance(self.model, SReT):
                self.model.permuter._used = 0  # a graph does not ask for permutations; this call does
            for parameter in self.parameters:
                parameter.grad = None
            found = function()
            for static, tensor in zip(outputs, found, strict=True):
                static.copy_(tensor)
            for gradient, parameter in zip(gradients, self.parameters, strict=True):
                assert (gradient is None) == (parameter.grad is None)
                if gradient is not None:
                    gradient.copy_(parameter.grad)

        return replay, outputs


def test_a_replay_has_the_inputs_and_gradients_of_its_call():
    model = nn.Linear(3, 1, bias=False)
    weight = model.weight
    graph = GraphedGradients([weight], StandIn([weight], model))

    def compute(x: Tensor) -> tuple[Tensor]:
        loss = (weight * x).sum()
        loss.backward()
        return (loss.detach(),)

    for step in range(WARM_UP + 4):
        x = torch.full((1, 3), float(step))
        (loss,) = graph(compute, x)
        assert loss == (weight * x).sum()
        assert torch.equal(weight.grad, x)
        weight.grad = None  # as optimizers do
    assert graph.record.replays == 4
    graph.reset()
    graph(compute, torch.ones(2, 3))
    assert graph.record.replays == 4


def test_static_permutations_are_those_of_a_plain_permuter():
    plain, static, places = Permuter(seed=3), StaticPermuter(Permuter(seed=3)), []
    for step in range(3):
        for permuter in (plain, static):
            permuter.load_state_dict({"seed": 3, "count": 1000 * step})
        pairs = [[p(n, 2, CPU, is_training=True).index for n in (16, 16, 4)] for p in (plain, static)]
        assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
        places.append([index.data_ptr() for index in pairs[1]])
    assert places[0] == places[1] == places[2]
    a, b = (permuter(16, 2, CPU, is_training=False).index for permuter in (plain, static))
    assert torch.equal(a, b)


CHANGES = {
    "plain": {},
    "mixed": {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.0, "ema_decay": 0.9, "clip_grad": 1.0},
    "late": {"recursion_start": 0.6},
    "taught": {"distillation": Distillation(teacher="TEACHER"), "label_smoothing": 0.0},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "weights.safetensors"
    save_weights(
        path,
        SReT(RECIPE.model).state_dict(),
        Card(config=RECIPE.model, preprocessing=GREY, class_names=tuple("0123456789")),
    )
    return path


@pytest.mark.parametrize(
    "name", ["late", *(pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "mixed", "taught"))]
)
def test_a_run_with_a_graph_ends_with_the_same_weights(name, teacher, tmp_path, monkeypatch):
    recipe, made = replace(RECIPE, **CHANGES[name]), []
    if recipe.distillation:
        recipe = replace(recipe, distillation=Distillation(teacher=str(teacher)))

    def make_graph(model: SReT, make=create.make_graph) -> GraphedGradients:
        made.append(make(model))
        made[0].record = StandIn(made[0].parameters, model)
        return made[0]

    train(recipe, tmp_path / "plain")
    monkeypatch.setattr(create, "make_graph", make_graph)
    monkeypatch.setattr(distributed, "refuse_cuda_graph", lambda *_: None)
    train(recipe, tmp_path / "graph", runtime=RuntimeConfig(cuda_graph=True))
    assert made[0].record.replays >= 2
    expected = weights(tmp_path / "plain")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(tmp_path / "graph").items())


def test_a_graph_that_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(InputError, match="NVIDIA GPU"):
        train(RECIPE, tmp_path / "run", runtime=RuntimeConfig(cuda_graph=True))
    on_gpu = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    nested = replace(RECIPE, model=replace(RECIPE.model, memory="nested"))
    for recipe, message in ((nested, "memory 'nested'"), (replace(RECIPE, mixed_precision="fp16"), "fp16")):
        with pytest.raises(InputError, match=message):
            distributed.refuse_cuda_graph(recipe, recipe.model_config(), on_gpu)
    distributed.refuse_cuda_graph(RECIPE, RECIPE.model_config(), on_gpu)
    for changes in ({"compile": True}, {"fsdp": True}, {"grad_accum_steps": 2}):
        with pytest.raises(InputError, match="cuda_graph cannot be used with"):
            RuntimeConfig(cuda_graph=True, **changes)
