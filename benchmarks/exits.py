"""Trains a model with exits on CIFAR-10, and measures what early exit saves at equal accuracy.

    python benchmarks/exits.py --data CIFAR10 --run runs/exits
    python benchmarks/exits.py --data CIFAR10 --run runs/exits-stages --exits stages --epochs 5

The threshold is chosen on validation images; accuracy is that on test images. The whole model, early exit and the queue
alternate in one process, and their outputs are compared first. Training is skipped if the folder has a finished run.
"""

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from sret import ModelConfig, SReT, StageConfig, fuse
from sret.bench.exits import fastest, time_exits, to_time
from sret.bench.timing import alternate, quartiles, ratio
from sret.checkpoints.card import load_weights
from sret.data.config import Augmentation
from sret.data.loading import ImageDataset
from sret.data.sources import load_data
from sret.elastic import ExitPolicy, Server, predict_with_exits
from sret.elastic.calibrate import fitted, outcomes, representative, scores_of
from sret.elastic.policy import Criterion
from sret.export.onnx import to_onnx
from sret.export.runtime import run_onnx
from sret.models.cost import model_cost
from sret.training.config import TrainConfig
from sret.training.loop import train
from sret.training.run_dir import BEST, REPORT
from sret.version import device_name, versions

# Channels, heads and passes of one block in each stage.
STAGES = {"passes": ((48, 2, 1), (96, 3, 6)), "stages": ((32, 2, 1), (64, 2, 2), (128, 4, 2))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a folder with train.parquet and test.parquet")
    parser.add_argument("--run", type=Path, required=True, help="the folder of the training run")
    parser.add_argument("--exits", choices=list(STAGES), default="passes")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_drop", type=float, default=0.3, help="points of accuracy")
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[1, 256])
    parser.add_argument("--images", type=int, default=1024, help="of a round, at batch size 1 a sixteenth of it")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--engines", action="store_true", help="also exported files: an easy and a hard image")
    options = parser.parse_args()
    if not (options.run / REPORT).exists():
        train(recipe(options), options.run, resume="auto")
    model, card = load_weights(options.run / BEST)
    model = fuse(model)
    data = load_data(options.data)
    parts = {
        split: load(ImageDataset(data.split(split), card.preprocessing), card.preprocessing)
        for split in ("val", "test")
    }
    every = {split: logits_of(model, images) for split, (images, _) in parts.items()}
    rows: list[dict[str, Any]] = []
    table: dict[str, list[dict[str, Any]]] = {}
    costs = model_cost(model.config).exit_macs
    for criterion in get_args(Criterion):
        at_1, on_val = fitted(criterion, every["val"], parts["val"][1])
        scores = {"val": on_val, "test": scores_of(at_1, every["test"])}
        chances, found = (
            outcomes(scores[split], every[split].argmax(2) == parts[split][1], costs) for split in ("val", "test")
        )
        table[criterion] = [vars(row) for row in found]
        images = parts["val"][0][representative(scores["val"], 32)]
        times = time_exits(model, at_1, to_time(chances, options.max_drop), images, options.rounds)
        chosen = fastest(*times, options.max_drop).outcome
        whole, at = (next(row for row in found if row.threshold == t) for t in (1, chosen.threshold))
        for batch_size in options.batch_sizes:
            count = options.images if batch_size > 1 else options.images // 16
            images = parts["test"][0][:: len(parts["test"][0]) // count][:count]
            row = measure(model, images, replace(at_1, threshold=at.threshold), batch_size, options)
            rows.append(
                {"criterion": criterion, "threshold": at.threshold, "top1": at.top1, "whole": whole.top1, **row}
            )
            print(json.dumps(rows[-1]), flush=True)
        if options.engines:
            policy = replace(at_1, threshold=chosen.threshold)
            for row in exported(model, parts["test"][0][:200], policy, options.rounds):
                rows.append({"criterion": criterion, "threshold": chosen.threshold, **row})
                print(json.dumps(rows[-1]), flush=True)
    exits = (every["test"].argmax(2) == parts["test"][1]).float().mean(1).mul(100).tolist()
    about = {"benchmark": "exits", **{name: getattr(options, name) for name in ("exits", "epochs", "seed")}}
    about |= {**versions(), "device": device_name("cpu"), "threads": torch.get_num_threads()}
    shares = [cost / costs[-1] for cost in costs]
    print(json.dumps({**about, "exits_top1": exits, "exits_macs": shares, "rows": rows, "thresholds": table}))


def recipe(options: argparse.Namespace) -> TrainConfig:
    """Short training, so that the benchmark takes minutes."""
    return TrainConfig(
        model=ModelConfig(
            stages=tuple(
                StageConfig(embed_dim=dim, num_heads=heads, num_blocks=1, groups=(1,) * passes, mlp_ratio=3.0)
                for dim, heads, passes in STAGES[options.exits]
            ),
            img_size=32,
            stem_stride=4,
            num_classes=10,
            exits=options.exits,
        ),
        data=options.data,
        epochs=options.epochs,
        seed=options.seed,
        batch_size=128,
        learning_rate=2e-3,
        warmup_epochs=0.5,
        label_smoothing=0.0,
        augmentation=Augmentation(geometry="pad", on_device=True),
    )


def load(images: ImageDataset, preprocessing: Any) -> tuple[Tensor, Tensor]:
    """All images, normalised, and their labels."""
    loaded = [images[i] for i in range(len(images))]
    labels = torch.tensor([int(label) for _, label, _ in loaded])
    return preprocessing.normalize(torch.stack([image for image, _, _ in loaded])), labels


@torch.inference_mode()
def logits_of(model: SReT, images: Tensor) -> Tensor:
    """(exits, N, K): the logits of all images at all exits."""
    return torch.cat([torch.stack(model.forward_exits(part)) for part in images.split(250)], 1)


@torch.inference_mode()
def measure(
    model: SReT, images: Tensor, policy: ExitPolicy, batch_size: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Images/s of the whole model and of early exit, and the medians of the ratios of all rounds."""
    batches = images.split(batch_size)

    def whole() -> Tensor:
        return torch.cat([model(batch) for batch in batches])

    def early() -> tuple[Tensor, Tensor]:
        found = [predict_with_exits(model, batch, policy) for batch in batches]
        return torch.cat([logits for logits, _ in found]), torch.cat([exits for _, exits in found])

    def queue() -> Tensor:
        found = sorted(Server(model, policy, batch_size).predict(batches), key=lambda result: result.number)
        return torch.stack([result.logits for result in found])

    # Outputs first: those of the exit that an image took, and those of the queue.
    logits, exits = early()
    every = logits_of(model, images)
    torch.testing.assert_close(logits, every[exits, torch.arange(len(images))], atol=1e-3, rtol=1e-3)
    same = (queue() - logits).abs().amax(1) < 1e-3  # others may leave elsewhere, by rounding
    assert same.float().mean() > 0.995
    torch.testing.assert_close(whole(), every[-1], atol=1e-3, rtol=1e-3)
    candidates = {"whole": whole, "early": early, "queue": queue}
    times = alternate({name: partial(run) for name, run in candidates.items()}, options.rounds)
    row: dict[str, Any] = {"batch_size": batch_size, "images": len(images), "mean_exit": exits.double().mean().item()}
    for name, seconds in times.items():
        low, median, high = (len(images) / s for s in quartiles(seconds))
        row[name] = {"images/s": median, "quartiles": [high, low], "faster": ratio(times["whole"], seconds)}
    return row


def exported(model: SReT, images: Tensor, policy: ExitPolicy, rounds: int) -> list[dict[str, Any]]:
    """Times of exported graphs for one image: without exits, and with early exit for an easy and a hard image."""
    size = (model.in_chans, *model.config.input_size)
    graphs = {"plain": to_onnx(model, size), "early": to_onnx(model, size, policy)}
    logits, exits = predict_with_exits(model, images, policy)
    rows = []
    for engine in ("onnxruntime", "openvino"):
        run = {name: run_onnx(graph.SerializeToString(), engine) for name, graph in graphs.items()}
        for image, expected in zip(images[:50], logits, strict=False):
            torch.testing.assert_close(
                torch.from_numpy(run["early"](image[None].numpy()))[0], expected, atol=1e-3, rtol=0
            )
        easy, hard = (images[exits == k][:1].numpy() for k in (exits.min(), exits.max()))
        calls = {"plain": partial(run["plain"], hard), "easy": partial(run["early"], easy)}
        times = alternate({**calls, "hard": partial(run["early"], hard)}, rounds)
        row: dict[str, Any] = {"engine": engine, "exits of 200 images": exits.bincount().tolist()}
        for name, seconds in times.items():
            row[name] = {"ms": 1e3 * quartiles(seconds)[1], "faster": ratio(times["plain"], seconds)}
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
