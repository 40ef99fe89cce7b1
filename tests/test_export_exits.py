"""An exported file with early exit gives each image what it gets alone in PyTorch, and holds each weight once."""

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from test_calibrate_exit import sret
from test_exits import IMAGES, exit_config, lively

from sret import ModelConfig, SReT, merge_tokens
from sret.checkpoints.card import Card, save_weights
from sret.data.preprocess import Preprocessing
from sret.elastic import ExitPolicy, predict_with_exits
from sret.export import export as exporting
from sret.export.export import export, export_model
from sret.export.onnx import to_onnx
from sret.export.runtime import load_exported

SUFFIXES = (".onnx", ".xml")
X = IMAGES.float()


def two_passes() -> ModelConfig:
    """Exits after two stages of one pass each, which are traced in seconds."""
    stages = exit_config().stages
    return exit_config("stages", stages=tuple(replace(s, num_blocks=1, groups=s.groups[:1]) for s in stages))


def card_of(model: SReT, policy: ExitPolicy | None) -> Card:
    preprocessing = Preprocessing(img_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    return Card(config=model.config, preprocessing=preprocessing, exit_policy=policy)


def middle(model: SReT, criterion: str) -> ExitPolicy:
    """A policy with which some of `X` leave at the first exit that can, others later; no score is near."""
    with torch.inference_mode():
        first, second = torch.stack(model.forward_exits(X)[:2]).softmax(2)
    rows = ((-1.0, 2.0, 1.0, -0.5, 1.5),) * (model.config.num_exits if criterion == "learned" else 0)
    policy = ExitPolicy(criterion=criterion, threshold=1, coefficients=rows)
    scores = policy.score(*((second, first, 1) if criterion == "agreement" else (first, None, 0)))
    return replace(policy, threshold=float(scores.sort().values[5:7].mean()))


def branches(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    return [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]


def bytes_of(graph: onnx.GraphProto) -> int:
    return sum(len(tensor.raw_data) for tensor in graph.initializer)


def ops(graph: onnx.GraphProto) -> list[str]:
    return [node.op_type for node in graph.node]


@pytest.mark.parametrize(
    ("exits", "criterion", "passes"),
    [
        ("stages", "confidence", None),
        pytest.param("passes", "learned", None, marks=pytest.mark.slow),
        pytest.param("merged stages", "confidence", None, marks=pytest.mark.slow),
        pytest.param("passes", "confidence", 2, marks=pytest.mark.slow),
    ],
)
def test_files_give_each_image_what_it_gets_alone(exits, criterion, passes, tmp_path: Path, monkeypatch):
    model = lively(SReT(exit_config(exits) if exits == "passes" else two_passes())).float()
    if exits == "merged stages":
        model = merge_tokens(model, [[4], [2]])
    model.set_passes(passes)
    policy = middle(model, criterion)
    traced = to_onnx(model, (3, 32, 32), policy)
    monkeypatch.setattr(exporting, "to_onnx", lambda *_: onnx.ModelProto.FromString(traced.SerializeToString()))
    logits, found = predict_with_exits(model, X, policy)
    assert len(found.unique()) > 1
    for suffix in SUFFIXES:
        result = export_model(model, card_of(model, None), tmp_path / f"m{suffix}", policy=policy)
        assert sum(result.exits) == result.comparison.count
        exported, card = load_exported(tmp_path / f"m{suffix}")
        assert card.exit_policy == policy
        for count in (1, 5, len(X)):
            torch.testing.assert_close(torch.cat([exported(x) for x in X.split(count)]), logits, rtol=0, atol=1e-5)
    graph, depth = traced.graph, 0
    held = bytes_of(graph)
    while "If" in ops(graph):  # what comes after an exit runs only in a branch
        stop, go_on = branches(graph)
        assert set(ops(stop)) == {"Identity"}
        assert "Softmax" in ops(go_on)
        held += bytes_of(stop) + bytes_of(go_on)
        graph, depth = go_on, depth + 1
    assert held < 1.06 * sum(parameter.nbytes for parameter in model.parameters())
    assert depth == len(model.forward_exits(X[:1])) - 1


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, folder = lively(SReT(two_passes())).float(), tmp_path_factory.mktemp("weights")
    for name, policy in (("w", middle(model, "confidence")), ("new", None)):
        save_weights(folder / f"{name}.safetensors", model.state_dict(), card_of(model, policy))
    plain = SReT(replace(model.config, exits="none"))
    save_weights(folder / "plain.safetensors", plain.state_dict(), card_of(plain, None))
    return folder


@pytest.mark.slow
def test_the_command_exports_the_stored_threshold(weights: Path, tmp_path: Path, capsys):
    file = tmp_path / "m.onnx"
    code, out, error = sret(capsys, "export", weights / "w.safetensors", file, "--exit", "auto")
    assert code == 0, error
    assert "early exit: images that left at exit 1, 2: " in out
    (tmp_path / "images").mkdir()
    from torchvision.transforms.functional import to_pil_image

    for i, image in enumerate(X):
        to_pil_image(image.clamp(-1, 1) / 2 + 0.5).save(tmp_path / "images" / f"{i}.png")
    command = ("predict", tmp_path / "images", "--json", "--exit", "auto", "--checkpoint")
    expected, found = (sret(capsys, *command, path)[1].splitlines() for path in (weights / "w.safetensors", file))
    for one, other in zip(expected, found, strict=True):
        assert json.loads(one)["classes"] == pytest.approx(json.loads(other)["classes"], abs=1e-5)
    code, _, error = sret(capsys, *command[:-2], "0.5", "--checkpoint", file)
    assert (code, error.count("\n")) == (2, 1)
    assert "is an exported file, which keeps its exits" in error


def test_a_plain_export_has_no_policy(weights: Path, tmp_path: Path, capsys):
    export(str(weights / "w.safetensors"), tmp_path / "m.onnx")
    assert load_exported(tmp_path / "m.onnx")[1].exit_policy is None
    assert "If" not in ops(onnx.load(tmp_path / "m.onnx").graph)
    code, _, error = sret(capsys, "predict", "x.png", "--checkpoint", tmp_path / "m.onnx", "--exit", "auto")
    assert (code, error.count("\n")) == (2, 1)
    assert "export the weights again with --exit" in error


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("plain", ("--exit", "0.5"), "has no exits; give no more passes"),
        ("new", ("--exit", "auto"), "calibrate-exit"),
        ("w", ("--exit", "1.5"), "a number >= 0 and <= 1"),
        ("w", ("--exit", "0.5", "--dtype", "int8", "--data", "digits"), "int8 cannot be used with early exit"),
    ],
)
def test_wrong_options_are_one_line(weights: Path, tmp_path: Path, capsys, name, options, text):
    code, _, error = sret(capsys, "export", weights / f"{name}.safetensors", tmp_path / "m.onnx", *options)
    assert (code, error.count("\n")) == (2, 1)
    assert text in error
    assert not list(tmp_path.iterdir())
