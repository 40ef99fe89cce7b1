"""One model trained for any number of passes, beside models trained for each number alone.

    python benchmarks/elastic.py --data CIFAR10 --seeds 0,1,2 --out elastic.jsonl

All models have the same images and settings. "alone k" has k passes; "elastic" is trained once with a drawn number of
passes (`pass_weights`), "late elastic" also with `recursion_start`, and once more with twice the epochs, which takes
less time than the separate models together; "all" is the model of all passes, run with fewer. Accuracy is that on test
images. Seconds are CPU time of the training. A second run with the same `--out` skips what is there.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from sret import ModelConfig, StageConfig
from sret.checkpoints.card import load_weights
from sret.data.config import Augmentation
from sret.export.runtime import load_model
from sret.inference.evaluate import evaluate_on
from sret.training.config import TrainConfig
from sret.training.loop import train
from sret.version import versions

PASSES = 3
STAGES = tuple(
    StageConfig(embed_dim=dim, num_heads=dim // 16, num_blocks=1, groups=groups, mlp_ratio=2.0)
    for dim, groups in ((32, (2, 2, 1)), (64, (1, 1, 1)), (128, (1, 1, 1)))
)
MODEL = ModelConfig(stages=STAGES, img_size=32, stem_stride=4, num_classes=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.parquet and test.parquet")
    parser.add_argument("--images", type=int, default=5000, help="of training; as many for the test")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--late", type=float, default=0.3, help="recursion_start of 'late elastic'")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {tuple(json.loads(line)["key"]) for line in lines}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        write_part(options.data, folder / "data", options.images)
        for seed in map(int, options.seeds.split(",")):
            recipe = recipe_of(MODEL, folder / "data", options.epochs, seed)
            for label, changed in contenders(recipe, options.late).items():
                if (label, seed) in done:
                    continue
                started = time.process_time()
                path = train(changed, folder / f"{label}-{seed}")
                row: dict[str, Any] = {"key": (label, seed), "cpu_seconds": round(time.process_time() - started, 1)}
                row["top1"] = {k: top1(path, k) for k in range(1, load_weights(path)[0].config.max_passes + 1)}
                row |= {name: getattr(options, name) for name in ("images", "epochs", "late")} | versions()
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def recipe_of(model: ModelConfig, data: Path, epochs: int, seed: int) -> TrainConfig:
    """The recipe of small models, for this benchmark and others."""
    return TrainConfig(
        model=model,
        data=str(data),
        epochs=epochs,
        batch_size=128,
        learning_rate=2e-3,
        clip_grad=1.0,
        augmentation=Augmentation(geometry="pad"),
        seed=seed,
    )


def write_part(data: Path, folder: Path, count: int) -> None:
    """Writes images of both splits, evenly over their order, as parquet files."""
    for split in ("train", "test"):
        rows = Dataset.from_parquet(str(data / f"{split}.parquet"))
        step = max(1, len(rows) // count)
        rows.select(range(0, step * count, step)).to_parquet(folder / f"{split}.parquet")


def contenders(recipe: TrainConfig, late: float) -> dict[str, TrainConfig]:
    """The recipes by name."""
    weights = (1.0,) * PASSES
    return {
        **{f"alone {k}": replace(recipe, model=MODEL.first_passes(k)) for k in range(1, PASSES)},
        "all": recipe,
        "elastic": replace(recipe, pass_weights=weights),
        "late elastic": replace(recipe, pass_weights=weights, recursion_start=late),
        "late elastic, twice the epochs": replace(
            recipe, pass_weights=weights, recursion_start=late, epochs=2 * recipe.epochs
        ),
    }


def top1(path: Path, passes: int) -> float:
    """Percent of right predictions on test images."""
    return evaluate_on(*load_model(path, passes), None, "test", 500).metrics.top1


if __name__ == "__main__":
    main()
