"""Token merging in trained models: without retraining, and trained with merging; accuracy and time beside the model.

    python benchmarks/merging_train.py --data CIFAR10 --seeds 0,1,2 --out merging_train.jsonl

A model of two stages (256 and 64 tokens, two passes each) is trained without merging, and once more with half of the
tokens of each stage merged in its first layer. The first also runs with a quarter and with half of its tokens merged.
The fused models alternate in one process, on one thread, on test images. A second run with the same `--out` skips the
seeds that are there.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from elastic import recipe_of, write_part
from elastic_combined import accuracy, run, test_images

from sret import ModelConfig, StageConfig, fuse, merge_tokens, model_cost
from sret.bench.timing import alternate, quartiles, ratio
from sret.checkpoints.card import load_weights
from sret.models.merge import merging_config
from sret.training.loop import train
from sret.version import device_name, versions

STAGES = tuple(
    StageConfig(embed_dim=dim, num_heads=dim // 24, num_blocks=1, groups=groups, mlp_ratio=3.0)
    for dim, groups in ((48, (4, 1)), (96, (1, 1)))
)
MODEL = ModelConfig(stages=STAGES, img_size=32, stem_stride=2, num_classes=10)
# Tokens merged in each slice of the first layer of a stage: of 64 in the first (256 in 4 slices) and of 64.
MERGES = {"a quarter": [[16], [16]], "half": [[32], [32]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.parquet and test.parquet")
    parser.add_argument("--images", type=int, default=5000, help="of training; as many for the test")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {json.loads(line)["seed"] for line in lines}
    about = {name: getattr(options, name) for name in ("images", "epochs", "rounds")}
    about |= {**versions(), "device": device_name("cpu"), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        write_part(options.data, folder / "data", options.images)
        for seed in map(int, options.seeds.split(",")):
            if seed not in done:
                row = {"seed": seed, "rows": of_seed(seed, folder, options), **about}
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def of_seed(seed: int, folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Trains both models of a seed; measures all ways to run them."""
    trained = {}
    for name, model in {"plain": MODEL, "half": merging_config(MODEL, MERGES["half"])}.items():
        recipe = recipe_of(model, folder / "data", options.epochs, seed)
        trained[name] = load_weights(train(recipe, folder / f"{name}-{seed}"))
    plain, card = trained["plain"]
    ways = {"without merging": plain}
    ways |= {f"{name}, no retraining": merge_tokens(plain, r) for name, r in MERGES.items()}
    ways["half, trained with merging"] = trained["half"][0]
    models = {name: fuse(model) for name, model in ways.items()}
    images, labels = test_images(folder, card)
    macs = {name: model_cost(model.config).macs for name, model in models.items()}
    rows: dict[str, dict[str, Any]] = {
        name: {"macs": macs[name] / macs["without merging"], "top1": accuracy(model, images, labels)}
        for name, model in models.items()
    }
    for batch_size in options.batch_sizes:
        batches = images[: max(16, 2 * batch_size)].split(batch_size)
        with torch.inference_mode():
            times = alternate({name: partial(run, model, batches) for name, model in models.items()}, options.rounds, 2)
        for name, seconds in times.items():
            count = sum(map(len, batches))
            rows[name][f"ms at batch {batch_size}"] = [1e3 * value / count for value in quartiles(seconds)]
            rows[name][f"speed at batch {batch_size}"] = ratio(times["without merging"], seconds)
    return rows


if __name__ == "__main__":
    main()
