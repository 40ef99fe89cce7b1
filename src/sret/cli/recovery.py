"""The steps of `sret recursify`: load, share, measure, distil, measure again, write the files."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from sret.bench.recovery import Quality, measure, to_table, write_report
from sret.checkpoints.card import METADATA_KEY, Card, load_any, save_weights
from sret.checkpoints.files import checksum, read_safetensors
from sret.data.dataset import ImageData, Samples, warn_of_mirrors
from sret.data.loading import ImageDataset, Unreadable
from sret.data.preprocess import Normalized, Preprocessing
from sret.data.sources import load_data
from sret.data.workers import worker_options
from sret.errors import InputError, InputWarning
from sret.inference.evaluate import evaluate
from sret.models.build import each_once, make_timm
from sret.models.recursify import found_groups, recursify
from sret.models.timm.config import OWN, Init, Sharing, TimmConfig
from sret.training.distillation.teacher import load_original
from sret.training.recovery.config import Recovery
from sret.training.recovery.distill import Pair, batches_of, check_state, compared_blocks, distill
from sret.version import device_name, versions

NUM_SAMPLES = 8  # training images that show `recursify` the order of the blocks


def recover(options: Mapping[str, Any], sharing: Sharing, settings: Recovery, accelerator: Accelerator) -> None:
    """Runs all steps, and prints the table of the report.

    Args:
        options: all options of the command.
        sharing, settings: those of them that say how the model is shared, and trained.

    Raises `InputError` for a model, data or options that do not fit together.
    """
    out, name, console = options["out"], options["model"], Console(highlight=False, soft_wrap=True)
    data = load_data(options["data"])
    original, config, preprocessing = original_of(name, options["weights"], options["model_args"], data)
    if settings.epochs:
        batches_of(settings, preprocessing, len(data.split("train")))  # refused before anything is measured
    images = first_images(data, preprocessing)
    init, sharing = sharing.init, found_groups(original.eval(), sharing, images)  # as the file says, without images
    shared = recursify(original, images, **{**vars(sharing), "init": init})
    blocks = compared_blocks(original, sharing.passes, sharing.parts)
    original, shared = original.to(accelerator.device), shared.to(accelerator.device)
    recipe = {"data": options["data"], **asdict(settings)}
    card = Card(
        config=replace(config, sharing=sharing),
        preprocessing=preprocessing,
        class_names=data.class_names,
        training={"data": data.fingerprint(), "recipe": recipe, "versions": versions()},
    )
    pair, key = Pair(original, shared, preprocessing, blocks), run_key(card, original, init)
    check_state(out, key)
    if settings.epochs:
        warn_of_mirrors(data, settings.augmentation)
    test = data.split("test" if "test" in data.splits else "val")
    quality = comparison(original, test, preprocessing, settings.batch_size, options["num_workers"], accelerator)
    measured = {"original": quality(original), "before": quality(shared)}
    before = measured["before"]
    console.print(
        f"{data.name}: {len(data.split('train')):,} images to train, {len(test):,} to test; top-1 "
        f"{measured['original'].top1:.2f} %, of the new model {before.top1:.2f} % before training (agreement "
        f"{before.agreement:.2f} %)"
    )

    def report(row: Mapping[str, float]) -> None:
        console.print(
            f"epoch {row['epoch']:3.0f}  loss {row['loss']:.4f}  predictions {row['predictions']:.4f}  features "
            f"{row['features']:.4f}  agreement in training {row['train_agreement']:.2f} %"
        )

    rows = distill(pair, data.split("train"), settings, out, key, options["num_workers"], report)
    if rows:
        measured["after"] = quality(shared)
        warn_if_worse(before, measured["after"])
    costs = measure(original, shared, images[:1].to(accelerator.device), options["rounds"])
    about = {
        "title": f"{name}, {data.name}, {len(test):,} test images",
        "options": {option: str(value) if isinstance(value, Path) else value for option, value in options.items()},
        "images": {"train": len(data.split("train")), "test": len(test)},
        "device": device_name(accelerator.device.type),
        "threads": torch.get_num_threads(),
        **versions(),
    }
    save_weights(out / "model.safetensors", each_once(shared, shared.state_dict()), card)
    write_report(out, about, costs, measured, rows)
    console.print(to_table(costs, measured))
    console.print(f"Weights in {out / 'model.safetensors'}, report in {out / 'report.json'} and {out / 'report.png'}")


def warn_if_worse(before: Quality, after: Quality) -> None:
    """Warns if the model is further from the original after training than before."""
    if after.agreement < before.agreement:
        warnings.warn(
            f"training lowered the agreement from {before.agreement:.2f} % to {after.agreement:.2f} %; try a smaller "
            "--learning_rate, or more --epochs",
            InputWarning,
            stacklevel=2,
        )


def original_of(
    name: str, weights: Path | None, arguments: Mapping[str, Any], data: ImageData
) -> tuple[nn.Module, TimmConfig, Preprocessing]:
    """The model to share, its configuration, and how it takes images.

    Args:
        name: of a model of timm; or a weights file of `sret train` with one.
        weights, arguments: as in `load_original`, for a name.

    Raises `InputError` if the model cannot be loaded, shares weights already, or has other classes than the data.
    """
    if Path(name).is_file():
        if weights is not None or arguments:
            raise InputError(f"{name} is a weights file, which has all settings; leave --weights and --model_args out")
        model, card = load_any(name)
        if not isinstance(card.config, TimmConfig):
            raise InputError(f"{name} has an SReT, which is recursive already; give a model of timm")
        if card.config.sharing.changed:
            raise InputError(f"{name}: its blocks have {card.config.sharing.changed} already; give the original")
        card.check_classes(data.name, data.class_names)
        return model, card.config, card.preprocessing
    if Path(name).is_dir() or Path(name).suffix in (".safetensors", ".pth", ".pt", ".bin"):
        read_safetensors(name)  # its error says what is there
    if weights is not None and weights.suffix == ".safetensors" and METADATA_KEY in read_safetensors(weights)[1]:
        raise InputError(f"{weights} was written by sret; give it in place of {name}, without --weights")
    own = {key: value for key, value in arguments.items() if key in OWN}
    rest = {key: value for key, value in arguments.items() if key not in OWN}
    config = TimmConfig(timm=name, args=rest, **{**own, "num_classes": len(data.class_names)})
    with torch.device("meta"):
        make_timm(config)  # its error is of the arguments alone
    model, preprocessing = load_original(name, weights, data.class_names, arguments)
    if data.crop_pct == 1:  # small squares of one size, whose border matters, as in `sret train`
        preprocessing = replace(preprocessing, crop_pct=1.0)
    return model, replace(config, img_size=preprocessing.img_size), preprocessing


def comparison(
    original: nn.Module,
    test: Samples,
    preprocessing: Preprocessing,
    batch_size: int,
    num_workers: int,
    accelerator: Accelerator,
) -> Callable[[nn.Module], Quality]:
    """Measures models on test images: accuracy, and agreement with the original."""
    dataset = ImageDataset(test, preprocessing)
    loader = accelerator.prepare(DataLoader(dataset, batch_size, **worker_options(num_workers)))

    def predictions(model: nn.Module) -> tuple[float, torch.Tensor]:
        result = evaluate(Normalized(model.eval(), preprocessing), loader, accelerator, Unreadable(0))
        assert result is not None  # there is no stop signal
        return result[0].top1, result[1].classes

    expected = predictions(original)[1]

    def quality(model: nn.Module) -> Quality:
        top1, classes = predictions(model)
        return Quality(top1, 100 * (classes == expected).float().mean().item())

    return quality


def first_images(data: ImageData, preprocessing: Preprocessing) -> torch.Tensor:
    """(B, C, H, W): a few training images as the model takes them. Raises `InputError` for an unreadable one."""
    samples = data.split("train")
    transform, few = preprocessing.transform(), range(min(NUM_SAMPLES, len(samples)))
    return preprocessing.normalize(torch.stack([transform(preprocessing.load(samples.images[i])) for i in few]))


def run_key(card: Card, original: nn.Module, init: Init) -> dict[str, Any]:
    """What must be equal to continue a run, as plain values; for the `init` "closest" the card has "first"."""
    model = card.config.to_dict()
    return {
        "model": {**model, "sharing": {**model["sharing"], "init": init}},
        "settings": card.training["recipe"],
        "data": card.training["data"],
        "weights": checksum({name: x.detach().cpu() for name, x in original.state_dict().items()}),
    }
