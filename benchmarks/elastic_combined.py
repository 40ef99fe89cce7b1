"""Fewer passes, early exit and token merging of one trained file, together, beside plain models: accuracy and time.

    python benchmarks/elastic_combined.py --data CIFAR10 --seeds 0,1,2 --out combined.jsonl --figure combined.png

One model is trained with exits and `pass_weights`. It runs with 1 to 3 passes, with and without merging half of the
tokens of the first stage, and with early exit at two thresholds. Beside it are plain models with 1 to 3 passes, and a
DeiT, all trained for as many epochs. The fused models alternate in one process, on one thread, on test images. A second
run with the same `--out` skips the seeds that are there.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from elastic import MODEL, PASSES, recipe_of, write_part
from matplotlib import pyplot as plt
from torch import Tensor, nn

from sret import SReT, fuse, merge_tokens
from sret.bench.timing import alternate, quartiles
from sret.checkpoints.card import Card, load_any
from sret.data.loading import ImageDataset
from sret.data.sources import load_data
from sret.elastic import EarlyExit, ExitPolicy
from sret.models.timm.config import TimmConfig
from sret.training.loop import train
from sret.version import device_name, versions

MARKERS = "o^sDvP*"
THRESHOLDS = (0.5, 0.8)  # confidence
DEIT = TimmConfig(
    timm="deit_tiny_patch16_224",
    args={"patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4},
    img_size=32,
    num_classes=10,
)
Predict = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.parquet and test.parquet")
    parser.add_argument("--images", type=int, default=4000, help="of training; as many for the test")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {json.loads(line)["seed"] for line in lines}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        write_part(options.data, folder / "data", options.images)
        for seed in map(int, options.seeds.split(",")):
            if seed not in done:
                row = {"seed": seed, "rows": of_seed(seed, folder, options), **about(options)}
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    if options.figure:
        draw([json.loads(line) for line in options.out.read_text().splitlines()], options.figure)


def about(options: argparse.Namespace) -> dict[str, Any]:
    values = {name: getattr(options, name) for name in ("images", "epochs", "rounds")}
    return {**values, **versions(), "device": device_name("cpu"), "threads": torch.get_num_threads()}


def of_seed(seed: int, folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Trains the models of a seed, and measures all ways to run them."""
    recipe = recipe_of(MODEL, folder / "data", options.epochs, seed)
    elastic = replace(recipe, model=replace(MODEL, exits="passes"), pass_weights=(1.0,) * PASSES, recursion_start=0.3)
    recipes = {"one file": elastic, "DeiT": replace(recipe, model=DEIT)}
    recipes |= {
        f"plain, {k} pass{'es' * (k > 1)}": replace(recipe, model=MODEL.first_passes(k)) for k in range(1, PASSES + 1)
    }
    loaded = {name: load_any(train(one, folder / f"{name}-{seed}")) for name, one in recipes.items()}
    ways: dict[str, Predict] = {}
    for name, (model, _) in loaded.items():
        ways |= ways_of_one_file(model) if name == "one file" and isinstance(model, SReT) else {name: fused(model)}
    images, labels = test_images(folder, loaded["one file"][1])
    rows: dict[str, dict[str, Any]] = {name: {"top1": accuracy(p, images, labels)} for name, p in ways.items()}
    for name, predict in ways.items():
        if isinstance(predict, EarlyExit):
            rows[name] |= {"exits": predict.counts.tolist(), "macs": predict.share_of_macs()}
    for batch_size in options.batch_sizes:
        chosen = images[:: len(images) // (8 * batch_size)] if batch_size < 100 else images
        batches = chosen[: max(16, 2 * batch_size)].split(batch_size)
        runs = {name: partial(run, predict, batches) for name, predict in ways.items()}
        with torch.inference_mode():
            times = alternate(runs, options.rounds, warm_up=1)
        for name, seconds in times.items():
            count = sum(map(len, batches))
            rows[name][f"ms at batch {batch_size}"] = [1e3 * value / count for value in quartiles(seconds)]
    return rows


def fused(model: nn.Module) -> nn.Module:
    return fuse(model) if isinstance(model, SReT) else model


def ways_of_one_file(model: SReT) -> dict[str, Predict]:
    """The same weights with fewer passes, merging and exits."""
    ways: dict[str, Predict] = {}
    rows, columns = model.config.grids()[0]
    for k in range(1, PASSES + 1):
        model.set_passes(k)
        whole = fuse(model)
        half = rows * columns // model.config.stages[0].groups[0] // 2
        merging = merge_tokens(whole, [[half], [], []])
        for suffix, net in (("", whole), (", merging", merging)):
            ways[f"{k} of {PASSES} passes{suffix}"] = net
            if k == PASSES:
                for threshold in THRESHOLDS:
                    policy = ExitPolicy(criterion="confidence", threshold=threshold)
                    ways[f"exit at {threshold}{suffix}"] = EarlyExit(net, policy)
    return ways


def test_images(folder: Path, card: Card) -> tuple[Tensor, Tensor]:
    """All test images, normalised, and their labels."""
    found = ImageDataset(load_data(str(folder / "data")).split("test"), card.preprocessing)
    images, labels, _ = zip(*(found[i] for i in range(len(found))), strict=True)
    return card.preprocessing.normalize(torch.stack(images)), torch.tensor(labels)


@torch.inference_mode()
def accuracy(predict: Predict, images: Tensor, labels: Tensor) -> float:
    """Percent of right predictions."""
    classes = torch.cat([predict(part).argmax(1) for part in images.split(250)])
    return 100 * (classes == labels).double().mean().item()


def run(predict: Predict, batches: tuple[Tensor, ...]) -> None:
    for batch in batches:
        predict(batch)


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against time of an image, the means over the seeds, for each batch size."""
    names = list(lines[0]["rows"])
    sizes = [key for key in lines[0]["rows"][names[0]] if key.startswith("ms")]
    figure, axes = plt.subplots(1, len(sizes), figsize=(5.5 * len(sizes) + 2.5, 5), layout="constrained", squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        for i, name in enumerate(names):
            rows = [line["rows"][name] for line in lines]
            time, top1 = (sum(values) / len(rows) for values in ([r[size][1] for r in rows], [r["top1"] for r in rows]))
            is_plain = name.startswith(("plain", "DeiT"))
            color = "black" if is_plain else "tab:orange" if "exit" in name else "tab:blue"
            face = "none" if "merging" in name else color
            axis.plot(time, top1, marker=MARKERS[i % len(MARKERS)], color=color, mfc=face, ls="none", label=name)
        axis.set(xlabel=f"{size.removeprefix('ms ')}: ms per image", ylabel="top-1, %")
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.suptitle(f"CIFAR-10, mean over seeds ({len(lines)}): one file, early exit, and plain models (black)")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
