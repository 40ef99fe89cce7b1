"""Trains CIFAR-10 from scratch for a number of minutes, one seed after the other, and tests each once.

    python benchmarks/cifar10_record.py --data cifar10 --out runs/record --minutes 4 --seeds 0,1,2

The recipe is recipes/cifar10_record.yaml, with at most 5 M parameters. The first epoch of a run that is thrown away
measures the time of a step, and on a GPU also that of its replay as a CUDA graph; the faster way is taken. The number
of epochs is the largest whose steps take at most `--minutes`. Validation images choose the epoch, and test images are
read once, after the training. Minutes count the steps; evaluation, and the start of the process, are in `wall`. A
second call with the same `--out` resumes where the first one was stopped.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from sret.checkpoints.card import load_weights
from sret.data.config import Augmentation
from sret.inference.evaluate import evaluate_on
from sret.models.build import totals_of
from sret.training.config import RuntimeConfig, TrainConfig
from sret.training.loop import train
from sret.training.run_dir import METRICS
from sret.version import versions

RECIPE = Path(__file__).parents[1] / "recipes" / "cifar10_record.yaml"
MAX_PARAMETERS = 5_000_000
WARM_UP_SHARE = 0.1  # of the epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="cifar10, or a folder of parquet files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--minutes", type=float, default=4, help="of training steps, for each seed")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--save_every", type=int, default=200, help="steps between two saved states")
    parser.add_argument("--small", action="store_true", help="a small model and digits, to try the script on a CPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    recipe = read_recipe(options.recipe, options.data, options.small)
    runtime = RuntimeConfig(num_workers=options.num_workers, save_every=options.save_every)
    plan = planned(recipe, runtime, options.out, options.minutes)
    runtime = replace(runtime, cuda_graph=plan["cuda_graph"])
    results = []
    for seed in map(int, options.seeds.split(",")):
        results.append(result_of(recipe, runtime, options.out / f"seed{seed}", seed, plan))
        print(json.dumps(results[-1]), flush=True)
    top1 = [result["test_top1"] for result in results]
    mean = sum(top1) / len(top1)
    print(f"{len(top1)} seeds, {plan['epochs']} epochs: test top-1 {mean:.2f} %, lowest {min(top1):.2f} %")


def read_recipe(path: Path, data: str, is_small: bool) -> TrainConfig:
    """The recipe for these data. Its warm-up is set when the number of epochs is known."""
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    values |= {"data": data, "epochs": 1, "warmup_epochs": 0, "augmentation": Augmentation(**values["augmentation"])}
    if is_small:
        stage = {"embed_dim": 16, "num_heads": 1, "num_blocks": 1, "groups": [2, 1]}
        values["model"] = {"img_size": 32, "stages": [stage]}
        values |= {"batch_size": 64, "data": "digits", "augmentation": Augmentation(geometry="affine", flip=False)}
    recipe = TrainConfig(**values)
    parameters = totals_of(recipe.model_config(10))[0]
    if parameters > MAX_PARAMETERS:
        raise SystemExit(f"the model has {parameters:,} parameters, more than {MAX_PARAMETERS:,}")
    return recipe


def planned(recipe: TrainConfig, runtime: RuntimeConfig, out: Path, minutes: float) -> dict[str, Any]:
    """The number of epochs, and whether steps are replayed as a CUDA graph; measured once for each folder."""
    path = out / "plan.json"
    if path.exists():
        return json.loads(path.read_text())
    plan: dict[str, Any] = {"minutes": minutes, "cuda_graph": False}
    plan["step_seconds"], plan["epoch_steps"] = step_of(recipe, runtime, out)
    if torch.cuda.is_available():
        try:
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # a capture that fails spoils its process
                plan["graph_step_seconds"], _ = pool.apply(step_of, (recipe, replace(runtime, cuda_graph=True), out))
            plan["cuda_graph"] = plan["graph_step_seconds"] < plan["step_seconds"]
        except Exception as error:
            plan["graph_error"] = " ".join(str(error).split())[:300] or type(error).__name__
    step = plan["graph_step_seconds"] if plan["cuda_graph"] else plan["step_seconds"]
    plan["epochs"] = max(1, int(60 * minutes / (step * plan["epoch_steps"])))
    path.write_text(json.dumps(plan))
    return plan


def step_of(recipe: TrainConfig, runtime: RuntimeConfig, out: Path) -> tuple[float, int]:
    """Seconds of a step, and steps of an epoch, in the first epoch of a run."""
    seconds: list[tuple[float, int]] = []
    train(
        recipe,
        out / f"probe{time.time_ns()}",
        runtime=runtime,
        on_metrics=lambda metrics: seconds.append((metrics.seconds, len(metrics.losses))),
    )
    later = seconds[len(seconds) // 2 :]  # the first steps compile, and choose kernels
    return sum(s for s, _ in later) / sum(n for _, n in later), sum(n for _, n in seconds)


def result_of(
    recipe: TrainConfig, runtime: RuntimeConfig, out: Path, seed: int, plan: Mapping[str, Any]
) -> dict[str, Any]:
    """The result of a seed, which is trained if it has none yet."""
    path, wall = out.with_suffix(".json"), out.with_suffix(".wall")
    if path.exists():
        return json.loads(path.read_text())
    epochs = plan["epochs"]
    started = time.monotonic()
    try:
        recipe = replace(recipe, epochs=epochs, warmup_epochs=WARM_UP_SHARE * epochs, seed=seed)
        best = train(recipe, out, resume="auto", runtime=runtime)
    finally:  # an interrupted run counts too
        before = float(wall.read_text()) if wall.exists() else 0.0
        wall.write_text(str(before + time.monotonic() - started))
    rows = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    model, card = load_weights(best)
    images = plan["epoch_steps"] * recipe.batch_size
    result = {
        "seed": seed,
        "test_top1": evaluate_on(model, card, recipe.data, batch_size=512).metrics.top1,
        "val_top1": max(row.get("ema_top1", row["val_top1"]) for row in rows),
        "epochs": epochs,
        "minutes": sum(images / row["images_per_second"] for row in rows) / 60,
        "cuda_graph": plan["cuda_graph"],
        "wall": float(wall.read_text()) / 60,
        **versions(),
    }
    path.write_text(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
