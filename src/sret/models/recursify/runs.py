"""Finds runs of equal blocks in a model by structure, so that no table of model names is needed.

A run is a sequence of neighbours in an `nn.Sequential` or `nn.ModuleList` with equal types, shapes and settings. A unit
of a run is one block, or several that repeat as a group, such as the plain and the shifted block of a Swin transformer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

MAX_PERIOD = 4  # blocks of a unit
# Settings that differ between the blocks of a model and change neither its shapes nor its windows.
IGNORED_SETTINGS = {"training", "drop_prob", "p", "fused_attn", "layer_idx", "layer_id", "block_idx", "block_id", "idx"}


@dataclass(frozen=True)
class Run:
    """Equal units that follow each other.

    Attributes:
        name: of the container, such as "blocks" or "layers.2.blocks".
        units: names of the blocks of each unit, in the order of the container.
    """

    name: str
    units: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> list[str]:
        """Names of all blocks, in order."""
        return [name for unit in self.units for name in unit]

    def __str__(self) -> str:
        period = len(self.units[0])
        units = "blocks" if period == 1 else f"groups of {period} blocks"
        return f"{self.name or 'the model'} ({len(self.units)} {units})"


def find_runs(model: nn.Module) -> list[Run]:
    """All runs of at least two units, in the order of the model; blocks themselves are not searched.

    The members of an `nn.ModuleList` are taken as a sequence; if they are branches instead, leave them out (`parts`).
    """
    return list(_runs_below(model, ""))


def _runs_below(module: nn.Module, name: str) -> Iterator[Run]:
    children = list(module.named_children())
    in_runs: set[str] = set()
    if isinstance(module, nn.Sequential | nn.ModuleList):
        signatures = [_signature(child) if _is_block(child) else None for _, child in children]
        start = 0
        while start < len(children):
            period, count = _longest_run(signatures[start:])
            if count < 2:
                start += 1
                continue
            names = [f"{name}.{child}".removeprefix(".") for child, _ in children[start : start + period * count]]
            in_runs.update(child for child, _ in children[start : start + period * count])
            units = [tuple(names[i : i + period]) for i in range(0, len(names), period)]
            yield Run(name, tuple(units))
            start += period * count
    for child_name, child in children:
        if child_name not in in_runs:
            yield from _runs_below(child, f"{name}.{child_name}".removeprefix("."))


def _longest_run(signatures: list[Any]) -> tuple[int, int]:
    """Of the runs that begin with the first signature, the longest: its period, and the number of units."""
    best = (1, 0)
    for period in range(1, min(MAX_PERIOD, len(signatures) // 2) + 1):
        unit, count = signatures[:period], 0
        if None in unit:
            break
        while signatures[count * period : (count + 1) * period] == unit:
            count += 1
        if count >= 2 and period * count > best[0] * best[1]:
            best = period, count
    return best


def _is_block(module: nn.Module) -> bool:
    """Whether a module has several layers with weights; a single layer is no block."""
    return sum(1 for part in module.modules() if part._parameters) > 1


def _signature(block: nn.Module) -> Any:
    """Equal for blocks that compute the same function if their weights are equal."""
    parts = [
        (
            name,
            type_before_parametrizations(part),
            tuple(sorted((k, v) for k, v in vars(part).items() if _is_setting(k, v))),
        )
        for name, part in block.named_modules()
        if not isinstance(part, nn.Identity) and type(part).__name__ != "DropPath"
    ]
    tensors = [(name, tuple(x.shape)) for name, x in (*block.named_parameters(), *block.named_buffers())]
    return parts, tensors


def _is_setting(name: str, value: Any) -> bool:
    return not name.startswith("_") and name not in IGNORED_SETTINGS and isinstance(value, int | float | str | tuple)
