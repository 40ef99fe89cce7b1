"""Measures deep models before and after training: activations, gradients, coefficients, accuracy (docs/depth.md).

    python benchmarks/depth.py start --out start.json
    python benchmarks/depth.py train --layers 1008 --seed 0 --runs RUNS --out train.json [--unshared]
    python benchmarks/depth.py transfer --checkpoint RUNS/passes_108_0/best.safetensors --out transfer.json

`start` compares initialisations: the size of the stream before each pass, and of the gradient there, for a batch of
digits. `train` trains on the digits with recipes/digits_deep.yaml. It records the coefficients after every epoch, and
the size of stream and gradients after training. `transfer` converts trained weights to fewer and more passes, to the
other named models, whose projections have other widths, and to a model without projections; it tests the converted
models without training. Each command appends lines of JSON to --out, which depth_figures.py draws.
A layer is one pass of attention and MLP.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sret import ModelConfig, SReT
from sret.checkpoints.adapt import transfer
from sret.checkpoints.card import load_weights
from sret.checkpoints.state import load_state
from sret.data.config import Augmentation
from sret.data.loading import ImageDataset
from sret.data.sources import load_data
from sret.inference.evaluate import evaluate_on
from sret.layers import Block
from sret.models.config import ResidualScale
from sret.models.variants import config_of
from sret.training.config import TrainConfig
from sret.training.loop import train
from sret.training.run_dir import BEST, METRICS, STATE
from sret.version import versions

RECIPE = Path(__file__).parent.parent / "recipes" / "digits_deep.yaml"
DEPTHS = (20, 108, 1008)
WAYS: tuple[tuple[ResidualScale, float], ...] = (
    ("one", 1.0),
    ("one", 0.0),
    ("sqrt", 1.0),
    ("passes", 1.0),
)  # residual_scale, and the initial value of beta
BATCH = 64
FACTORS = (0.25, 0.5, 1, 2, 4, 9)  # of the passes
POINTS = 50  # in a curve over layers


def deep(layers: int, scale: ResidualScale = "passes", *, is_unshared: bool = False) -> ModelConfig:
    """The named model for 32 pixels and grey images; unshared: a plain transformer with the same number of layers."""
    config = replace(config_of(f"sret_deep_{layers}_32"), in_chans=1, memory="none", residual_scale=scale)
    if not is_unshared:
        return config
    stages = [replace(stage, num_blocks=stage.depth, groups=(1,), projection_ratio=None) for stage in config.stages]
    return replace(config, stages=tuple(stages), learnable_residual=False, residual_scale="one")


def stream_and_gradient(model: SReT, images: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Mean square of the stream before each layer, and root mean square of the gradient of the summed loss there."""
    streams: list[Tensor] = []

    def listen(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        streams.append(inputs[0])
        if inputs[0].requires_grad:
            inputs[0].retain_grad()

    hooks = [module.register_forward_pre_hook(listen) for module in model.modules() if isinstance(module, Block)]
    model.zero_grad()
    cross_entropy(model.train()(images), labels, reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return {
        "activation": [x.detach().square().mean().item() for x in streams],
        "gradient": [x.grad.square().mean().sqrt().item() for x in streams if x.grad is not None],
        "weights_gradient": [
            torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item() / len(labels)
        ],
    }


def is_coefficient(key: str) -> bool:
    return key.endswith((".alpha", ".beta"))


def subsampled(curves: dict[str, list[float]]) -> dict[str, list[list[float]]]:
    """[layer from 1, value] pairs: at most `POINTS`, evenly spaced, with the first and the last layer."""

    def places(count: int) -> list[int]:
        return sorted({round(k * (count - 1) / (POINTS - 1)) for k in range(POINTS)})

    return {name: [[i + 1, float(f"{values[i]:.4g}")] for i in places(len(values))] for name, values in curves.items()}


def digits(config: ModelConfig) -> tuple[Tensor, Tensor]:
    data = load_data("digits")
    preprocessing = data.preprocessing(config.input_size)
    dataset = ImageDataset(data.split("train"), preprocessing)
    images, labels, _ = zip(*(dataset[i] for i in range(BATCH)), strict=True)
    return preprocessing.normalize(torch.stack(images)), torch.tensor(labels)


def start(options: argparse.Namespace) -> None:
    images, labels = digits(deep(20))
    cases = [(layers, scale, beta, False) for layers in DEPTHS for scale, beta in WAYS]
    for layers, scale, beta, is_unshared in [*cases, (108, "one", 1.0, True)]:
        torch.manual_seed(options.seed)
        model = SReT(deep(layers, scale, is_unshared=is_unshared))
        for key, parameter in model.named_parameters():
            if key.endswith(".beta"):
                nn.init.constant_(parameter, beta)
        curves = stream_and_gradient(model, images, labels)
        gradients = [
            p.grad.abs().item() for n, p in model.named_parameters() if is_coefficient(n) and p.grad is not None
        ]
        largest = max(gradients, default=0.0) / BATCH
        name = "unshared" if is_unshared else f"scale {scale}, beta {beta:g}"
        a, g = curves["activation"], curves["gradient"]
        print(
            f"{layers:5} layers  {name:22} activation {a[0]:.3g} .. {a[-1]:.3g}   gradient {g[0]:.2e} .. {g[-1]:.2e}   "
            f"of the weights {curves['weights_gradient'][0]:.3g}, of a coefficient at most {largest:.3g}",
            flush=True,
        )
        about = {"layers": layers, "way": name, "seed": options.seed, "coefficient_gradient": float(f"{largest:.4g}")}
        add(options.out, {"kind": "start", **about, **subsampled(curves), **versions()})


def recipe_for(config: ModelConfig, seed: int) -> TrainConfig:
    """recipes/digits_deep.yaml for a model."""
    values = yaml.safe_load(RECIPE.read_text())
    values |= {"augmentation": Augmentation(**values["augmentation"]), "model": config, "seed": seed}
    return TrainConfig(**values)


def trained(options: argparse.Namespace) -> None:
    config = deep(options.layers, is_unshared=options.unshared)
    recipe = recipe_for(config, options.seed)
    name = f"{'unshared' if options.unshared else 'passes'}_{options.layers}_{options.seed}"
    out = options.runs / name
    coefficients: list[dict[str, list[float]]] = []
    epoch_steps = len(load_data("digits").split("train")) // recipe.batch_size
    for epoch in range(recipe.epochs):
        train(recipe, out, resume="auto", max_steps=(epoch + 1) * epoch_steps)
        coefficients.append(spreads(load_state(out / STATE)["model"]))
    rows = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    model, card = load_weights(out / BEST)
    tested = evaluate_on(model, card).metrics
    line = {
        "kind": "train",
        "layers": config.depth,
        "way": "unshared" if options.unshared else "scale passes",
        "seed": options.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_top1": round(tested.top1, 2),
        "rows": [{key: round(row[key], 4) for key in ("epoch", "train_loss", "val_loss", "val_top1")} for row in rows],
        "coefficients": coefficients,
        **subsampled(stream_and_gradient(model, *digits(config))),
        **versions(),
    }
    print(f"{name}: {tested.top1:.2f} % of {tested.count} test images")
    add(options.out, line)


def transferred(options: argparse.Namespace) -> None:
    model, card = load_weights(options.checkpoint)
    config = model.config
    targets = []
    for factor in FACTORS:
        stages = [replace(s, groups=(1,) * max(1, round(factor * s.num_passes))) for s in config.stages]
        targets.append(replace(config, stages=tuple(stages)))
    targets += [deep(layers) for layers in DEPTHS if layers != config.depth]  # their projections have other widths
    targets.append(replace(config, stages=tuple(replace(stage, projection_ratio=None) for stage in config.stages)))
    for target in targets:
        other = SReT(target)
        report = transfer(other, model.state_dict(), config)
        tested = evaluate_on(other.eval(), replace(card, config=other.config)).metrics
        print(f"{config.depth} -> {other.config.depth} layers: {tested.top1:.2f} % ({'; '.join(report)})", flush=True)
        line = {
            "kind": "transfer",
            "from": config.depth,
            "layers": other.config.depth,
            "projection_ratios": [stage.projection_ratio for stage in (config.stages[0], target.stages[0])],
            "test_top1": round(tested.top1, 2),
        }
        add(options.out, {**line, "loss": round(tested.loss, 4), **versions()})


def spreads(state: dict[str, Tensor]) -> dict[str, list[float]]:
    """Minimum, median and maximum of each kind of coefficient, as stored (before the scale)."""
    found: dict[str, list[float]] = {}
    for key, value in state.items():
        if is_coefficient(key):
            owner = "projection" if ".projections." in key else key.split(".")[-2]
            found.setdefault(f"{owner} {key.rpartition('.')[2]}", []).append(value.item())
    return {kind: [round(x, 4) for x in (min(v), sorted(v)[len(v) // 2], max(v))] for kind, v in sorted(found.items())}


def add(out: Path, line: dict[str, Any]) -> None:
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in (("start", start), ("train", trained), ("transfer", transferred)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--seed", type=int, default=0)
        if run is transferred:
            command.add_argument("--checkpoint", type=Path, required=True)
        if run is trained:
            command.add_argument("--layers", type=int, choices=DEPTHS, default=1008)
            command.add_argument("--unshared", action="store_true")
            command.add_argument("--runs", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
