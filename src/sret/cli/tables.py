"""Prints tables of the cost of models: all named models, or one model by stage and pass."""

from dataclasses import replace
from itertools import groupby
from typing import Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from sret.checkpoints.card import Card
from sret.checkpoints.resolve import is_name
from sret.errors import first_few, printable
from sret.export.runtime import load_model
from sret.files import format_bytes
from sret.layers.gpu_path import gpu_path
from sret.models.build import totals_of
from sret.models.config import ModelConfig
from sret.models.cost import model_cost
from sret.models.sret import SReT
from sret.models.timm.config import TimmConfig
from sret.models.variants import CONFIGS, RELEASES, config_of

SHOWN_CLASSES = 10


def print_variants(console: Console, size: tuple[int, int] | None) -> None:
    """Prints parameters, MACs, slices and published accuracy of all models, at `size` pixels or their own size."""
    console.print(_variants_table(size))
    console.print(
        "MACs: multiply-adds for one image. Slices: first pass / later passes, by stage.\n"
        "Top-1: ImageNet-1K, %, [distilled], as published by the authors; not reproduced here.",
        markup=False,
        soft_wrap=True,
    )


def _variants_table(size: tuple[int, int] | None) -> Table:
    table = _table("model", "pixels", "parameters", "MACs", "slices", "top-1")
    for name, config in CONFIGS.items():
        cost = model_cost(config, size)
        height, width = size or config.input_size
        first, later = ("-".join(str(stage.groups[i]) for stage in config.stages) for i in (0, -1))
        table.add_row(
            name,
            str(height) if height == width else f"{height}x{width}",
            f"{cost.parameters:,}",
            f"{cost.macs / 1e9:.2f} G",
            "none" if {first, later} == {"1-1-1"} else f"{first} / {later}",
            _published(name),
        )
    return table


def _table(*columns: str, justify: Literal["left", "right"] = "left") -> Table:
    """A table that fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, justify=justify, no_wrap=True)
    return table


def _published(variant: str) -> str:
    def top1(tag: str) -> str:
        release = RELEASES.get(f"{variant}.{tag}")
        return f"{release.top1:.1f}" if release else ""

    distilled = f"[{top1('dist_in1k')}]" if top1("dist_in1k") else ""
    return f"{top1('in1k')} {distilled}".strip().replace("[", r"\[")


def gpu_path_of(config: ModelConfig) -> str:
    """Which kernels a model with this configuration uses on a GPU, and why."""
    with torch.device("meta"):
        return gpu_path(SReT(config))


def _print_timm(console: Console, name: str, config: TimmConfig, size: tuple[int, int] | None) -> None:
    """Prints parameters, MACs and settings of a model of timm, called `name`, for images of `size` pixels."""
    parameters, macs = totals_of(replace(config, img_size=size or config.img_size))
    height, width = size or config.input_size
    console.print(
        f"{name} at {height}x{width}: {parameters:,} parameters ({format_bytes(4 * parameters)} in float32), "
        f"{macs / 1e9:.3f} G MACs ({2 * macs / 1e9:.3f} GFLOPs)\n"
        f"{config.timm} of timm; arguments: {config.args or 'none'}; "
        f"shared blocks: {config.sharing.changed or 'none'}",
        soft_wrap=True,
        markup=False,
    )


def _print_card(console: Console, card: Card) -> None:
    """Prints the classes of a file, how it prepares images, and when they leave early."""
    how, names = card.preprocessing, [printable(name) for name in card.class_names]
    classes = first_few(names, SHOWN_CLASSES) if names else "without names"
    (height, width), kind = how.img_size, {1: "grey", 3: "colour"}[len(how.mean)]
    mean, std = ("[" + ", ".join(f"{value:.4g}" for value in values) + "]" for values in (how.mean, how.std))
    lines = [
        f"Classes: {card.config.num_classes}: {classes}",
        f"Images: {kind}, {height}x{width} pixels, {how.interpolation}, the central {100 * how.crop_pct:.4g} % of each "
        f"side; in 0..1, mean {mean}, std {std}",
    ]
    if card.exit_policy is not None:
        lines.append(f"Early exit: {card.exit_policy} (--exit auto)")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def print_model(console: Console, name: str, size: tuple[int, int] | None) -> None:
    """Prints parameters, MACs, tokens and slices of one model, a name or a file, by stage and pass."""
    card = None if is_name(name) else load_model(name)[1]
    config = config_of(name) if card is None else card.config
    if isinstance(config, TimmConfig):
        _print_timm(console, name, config, size)
        assert card is not None
        _print_card(console, card)
        return
    cost = model_cost(config, size)
    height, width = size or config.input_size
    console.print(
        f"{name} at {height}x{width}: {cost.parameters:,} parameters ({format_bytes(cost.bytes)} in float32), "
        f"{cost.macs / 1e9:.3f} G MACs ({cost.flops / 1e9:.3f} GFLOPs), {config.depth} layers",
        soft_wrap=True,
    )
    table = _table(
        "stage",
        "tokens",
        "dim",
        "heads",
        "blocks",
        "parameters",
        "pass",
        "slices",
        "tokens/slice",
        "MACs",
        justify="right",
    )
    for i, (stage, stage_cost) in enumerate(zip(config.stages, cost.stages, strict=True)):
        last = 0
        for pass_cost, alike in groupby(stage_cost.passes):
            first, last = last + 1, last + len(list(alike))
            rows, columns = stage_cost.grid
            whole = (
                str(i + 1),
                f"{rows}x{columns}",
                str(stage.embed_dim),
                str(stage.num_heads),
                str(stage.num_blocks),
                f"{stage_cost.parameters:,}",
            )
            table.add_row(
                *(whole if first == 1 else [""] * len(whole)),
                str(first) if first == last else f"{first}-{last}",
                str(pass_cost.num_groups),
                str(pass_cost.slice_length),
                f"{pass_cost.macs / 1e6:.0f} M",
                end_section=last == stage.num_passes,
            )
    console.print(table)
    parts = (f"{part} {n:,} ({n / cost.parameters:.0%})" for part, n in cost.parameters_by_part().items())
    console.print(f"Parameters: {', '.join(parts)}", soft_wrap=True)
    if config.is_merging:
        merged = ", ".join(str(list(stage.merge)) for stage in config.stages)
        console.print(f"Merged tokens of a slice, by stage and layer: {merged}", soft_wrap=True, markup=False)
    console.print(f"On a GPU: {gpu_path_of(config)}", soft_wrap=True)
    if card is not None:
        _print_card(console, card)
    for tag, release in RELEASES.items():
        if tag == name or tag.startswith(f"{name}."):
            console.print(f"{tag}: {release.top1:.1f} % top-1 on ImageNet-1K as published ({release.official})")
