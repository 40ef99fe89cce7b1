"""What test_parallel.py runs in each of two processes: the same short runs, in several layouts, one after the other."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from sret import ModelConfig, StageConfig
from sret.data.config import Augmentation
from sret.data.sources import load_data
from sret.training import loop
from sret.training.config import RuntimeConfig, TrainConfig
from sret.training.distillation.config import Distillation
from sret.training.distillation.precompute import write_soft_labels
from sret.training.loop import train
from sret.training.run_dir import BEST

STEPS = 5
MODEL = ModelConfig(
    stages=(
        StageConfig(embed_dim=16, num_heads=2, num_blocks=1, groups=(4, 2, 2), mlp_ratio=2.0),
        StageConfig(embed_dim=32, num_heads=2, num_blocks=1, groups=(1, 1), mlp_ratio=2.0),
    ),
    img_size=16,
    in_chans=1,
    num_classes=10,
    stem_stride=2,
)
# Plain gradient descent with momentum: Adam would magnify rounding where a gradient is nothing but rounding, as that
# of a bias before BatchNorm is.
RECIPE = TrainConfig(
    model=MODEL,
    epochs=2,
    batch_size=16,  # four steps an epoch, so that five pass an evaluation
    optimizer="sgd",
    learning_rate=0.02,
    warmup_epochs=0,
    clip_grad=1.0,
    mixup=0.8,
    cutmix=1.0,
    ema_decay=0.9,
    augmentation=Augmentation(geometry="affine", flip=False),
)
ADAM = replace(RECIPE, optimizer="adamw", learning_rate=1e-3, layer_decay=0.8, freeze=("stem",))
DEEPER = ((4, 2, 2, 1, 2, 4, 1, 2, 1, 4, 2), (1,) * 8)
POLICIES = ("pass", "nested", "reversible", "truncated:2")
LAYOUTS = {
    "ddp": RuntimeConfig(),
    "sharded": RuntimeConfig(fsdp=True),
    **{f"ddp_{policy}": RuntimeConfig() for policy in POLICIES},
    **{f"sharded_{policy}": RuntimeConfig(fsdp=True) for policy in POLICIES},
    "sharded_accumulated": RuntimeConfig(fsdp=True, grad_accum_steps=2),
    "ddp_accumulated": RuntimeConfig(grad_accum_steps=2),
    "ddp_bf16": RuntimeConfig(),
    "sharded_bf16": RuntimeConfig(fsdp=True),
}


def write_images(root: Path) -> Path:
    """Writes some of the digits as files: 7 of each class for training, 3 for validation."""
    for split, count in {"train": 7, "val": 3}.items():
        written: Counter[int] = Counter()
        samples = load_data("digits").split(split)
        for image, label in zip(samples.images, samples.labels, strict=True):
            if written[label] < count:
                path = root / split / str(label) / f"{written[label]}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
                written[label] += 1
    return root


def recipe_of(name: str, images: Path) -> TrainConfig:
    """The parts of an accumulated step have BatchNorm statistics of their own, unless the stem is frozen."""
    return replace(_recipe_of(name), data=str(images))


def _recipe_of(name: str) -> TrainConfig:
    policy = name.partition("_")[2]
    if policy in POLICIES:
        deeper = [replace(stage, groups=groups) for stage, groups in zip(MODEL.stages, DEEPER, strict=True)]
        model = replace(MODEL, stages=tuple(deeper), residual_scale="passes")
        return replace(RECIPE, model=replace(model, memory=policy, reversible=policy == "reversible"))
    if name.endswith("bf16"):
        return replace(RECIPE, mixed_precision="bf16")
    if name.startswith("adam"):
        return ADAM
    return replace(RECIPE, freeze=("stem",)) if name.endswith("accumulated") else RECIPE


if __name__ == "__main__":
    out = Path(sys.argv[1])
    images = out / "images"
    loop.write_png = lambda path, *_: path.write_bytes(b"")  # a report takes longer than the training
    for name, runtime in LAYOUTS.items():
        train(recipe_of(name, images), out / name, max_steps=STEPS, runtime=runtime)
    for name in ("sharded", "ddp"):  # begun by one process (and "sharded" by two of DDP in between)
        runtime, adam = RuntimeConfig(fsdp=name == "sharded"), recipe_of("adam", images)
        train(adam, out / f"adam_{name}", resume="auto", max_steps=3, runtime=RuntimeConfig())
        train(adam, out / f"adam_{name}", resume="auto", max_steps=4, runtime=runtime)
    train(recipe_of("back", images), out / "back", max_steps=3, runtime=RuntimeConfig(fsdp=True))
    list(write_soft_labels(out / "labels", "digits", Distillation(teacher=str(out / "ddp" / BEST)), crops=1))
