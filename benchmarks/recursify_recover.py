"""Shares the blocks of small models trained on CIFAR-10, and trains them further: what accuracy comes back.

    python benchmarks/recursify_recover.py --data cifar10 --family deit --seeds 0,1,2 --out recover.jsonl

A model is trained on some of the images, converted in several ways, and trained for a few more epochs with the labels,
or with the original's predictions as targets (distillation). "more" trains the original for the same epochs. All of
them have the same images in the same order. Accuracy is that on test images, before and after; agreement is the share
of them for which the model predicts what the original predicts. A second run with the same `--out` skips what is there.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sret.data.config import Augmentation
from sret.data.on_device.loaders import BatchAugmentation, keys_of, load_images
from sret.data.preprocess import Preprocessing
from sret.data.sampler import EpochBatches
from sret.data.sources import load_data
from sret.models.recursify import recursify
from sret.version import versions

PREPROCESSING = Preprocessing(img_size=(32, 32), mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN: dict[str, Any] = {"img_size": 32, "patch_size": 4, "num_classes": 10}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "deit": lambda: timm.create_model("deit_tiny_patch16_224", **PLAIN, embed_dim=64, depth=6, num_heads=2),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224",
        **{**PLAIN, "patch_size": 2},
        window_size=4,
        embed_dim=24,
        depths=(2, 12),  # 6 pairs of a plain and a shifted block can be shared by two and by three
        num_heads=(1, 2),
        drop_path_rate=0.0,
    ),
    "mixer": lambda: MlpMixer(**PLAIN, num_blocks=6, embed_dim=64),
}
SHARED: dict[str, dict[str, Any]] = {
    "strict": {"passes": 2},
    "mean": {"passes": 2, "init": "mean"},
    "closest": {"passes": 2, "init": "closest"},
    "similar": {"passes": 2, "share": "similar"},
    "rank 8": {"passes": 2, "init": "mean", "rank": 8},
    "scale": {"passes": 2, "scale": "scalar"},
    "vector": {"passes": 2, "scale": "vector"},
    "NLL": {"passes": 2, "projection": True},
    "strict 3x": {"passes": 3},
    "rank 8 3x": {"passes": 3, "init": "mean", "rank": 8},
    "extra pass": {"extra_passes": 1},
    "more": {},
}
LEARNING_RATE = 1e-3
SAMPLES = 128  # images that show how alike blocks are
Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]  # of an epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="cifar10, or a folder of parquet files")
    parser.add_argument("--family", choices=FAMILIES, default="deit")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ways", nargs="+", choices=SHARED, default=list(SHARED), help="how blocks are shared")
    parser.add_argument(
        "--distilled", nargs="+", choices=SHARED, default=list(SHARED), help="those of them also distilled"
    )
    parser.add_argument("--images", type=int, default=5000, help="of training; as many for the test")
    parser.add_argument("--epochs", type=int, default=12, help="of the original")
    parser.add_argument("--recover", type=int, default=4, help="epochs after the conversion")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {tuple(json.loads(line)["key"]) for line in lines}
    train, test = (images_of(options.data, split, options.images) for split in ("train", "test"))
    for seed in map(int, options.seeds.split(",")):
        batches = batches_of(*train, options.batch_size, seed)
        torch.manual_seed(seed)
        original = FAMILIES[options.family]().to(DEVICE)
        seconds = fit(original, batches, range(options.epochs), None)
        for name in options.ways:
            for is_distilled in (False, True)[: 1 + (name in options.distilled)]:
                key = (options.family, seed, name, is_distilled)
                if key in done:
                    continue
                needs_images = not {"closest", "similar"}.isdisjoint(SHARED[name].values())
                images = PREPROCESSING.normalize(train[0][:SAMPLES].float() / 255) if needs_images else None
                model = recursify(original, images, **SHARED[name])
                row: dict[str, Any] = {"key": key, "parameters": sum(p.numel() for p in model.parameters())}
                row["top1_original"], _ = accuracy(original, original, *test)
                row["top1_before"], row["agreement_before"] = accuracy(model, original, *test)
                epochs = range(options.epochs, options.epochs + options.recover)
                row["seconds"] = fit(model, batches, epochs, copy.deepcopy(original).eval() if is_distilled else None)
                row["top1"], row["agreement"] = accuracy(model, original, *test)
                row |= {"seconds_original": seconds, **vars(options), "out": None, **versions()}
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def images_of(data: str, split: str, count: int) -> tuple[Tensor, Tensor]:
    """(N, 3, 32, 32) uint8 and labels: random images, the same in each run."""
    samples = load_data(data).split(split)
    chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:count]
    samples = samples.subset(sorted(chosen.tolist()))
    return load_images(samples, PREPROCESSING, DEVICE), torch.tensor(list(samples.labels), device=DEVICE)


def batches_of(images: Tensor, labels: Tensor, batch_size: int, seed: int) -> Batches:
    """Shifted and flipped images of an epoch, as a function of seed and epoch."""
    augment = BatchAugmentation(Augmentation(geometry="pad"), PREPROCESSING, has_crops=False)
    order = EpochBatches(len(images), batch_size, seed)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order.start_at(epoch)
        for batch in order:
            rows = torch.tensor([sample.image for sample in batch], device=DEVICE)
            yield PREPROCESSING.normalize(augment(images[rows], keys_of(seed, batch))), labels[rows]

    return batches


def fit(model: nn.Module, batches: Batches, epochs: range, teacher: nn.Module | None) -> float:
    """Trains with AdamW and one cycle of the learning rate; returns the seconds."""
    steps = sum(1 for _ in batches(0)) * len(epochs)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    model.train()
    started = time.perf_counter()
    for epoch in epochs:
        for x, y in batches(epoch):
            with torch.no_grad():
                target = y if teacher is None else teacher(x).softmax(1)
            loss = cross_entropy(model(x), target)
            if not loss.isfinite():
                raise RuntimeError(f"the loss became {loss.item()} in epoch {epoch}")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return time.perf_counter() - started


@torch.no_grad()
def accuracy(model: nn.Module, original: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Percent of right predictions, and percent that the original makes too."""
    right, same = 0.0, 0.0
    model.eval()
    original.eval()
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        x = PREPROCESSING.normalize(x.float() / 255)
        found, expected = model(x).argmax(1), original(x).argmax(1)
        right, same = right + (found == y).sum().item(), same + (found == expected).sum().item()
    return 100 * right / len(labels), 100 * same / len(labels)


if __name__ == "__main__":
    main()
