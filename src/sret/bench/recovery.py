"""Reports what sharing blocks costs and gains: a table, a JSON file and a figure."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sret.bench.timing import alternate, quartiles
from sret.files import format_bytes, replacing, write_atomically
from sret.models.build import count_macs


@dataclass(frozen=True)
class Costs:
    """Of one model, for one image. Times are the median of the rounds, which alternate with the other model's.

    `peak_bytes` is the largest sum of weights, image and activations that exist at the same time.
    """

    parameters: int
    weight_bytes: int
    peak_bytes: int
    macs: int
    latency_ms: float
    latency_quartiles_ms: tuple[float, float]


@dataclass(frozen=True)
class Quality:
    """On the same images, in percent: accuracy, and how often the prediction is the original's."""

    top1: float
    agreement: float


def measure(original: nn.Module, shared: nn.Module, image: torch.Tensor, rounds: int) -> dict[str, Costs]:
    """The costs of both models for an image (1, C, H, W) on its device."""
    models = {"original": original.eval(), "shared": shared.eval()}
    with torch.inference_mode():
        seconds = alternate({name: partial(model, image) for name, model in models.items()}, rounds)
    costs = {}
    for name, model in models.items():
        low, middle, high = (1e3 * value for value in quartiles(seconds[name]))
        weights = list(model.parameters())
        costs[name] = Costs(
            parameters=sum(p.numel() for p in weights),
            weight_bytes=sum(p.numel() * p.element_size() for p in weights),
            peak_bytes=peak_bytes(model, image),
            macs=count_macs(model, image),
            latency_ms=middle,
            latency_quartiles_ms=(low, high),
        )
    return costs


class _Storages(TorchDispatchMode):
    """Counts the bytes of the tensors that operations return, while these exist."""

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakSet[torch.UntypedStorage]()
        self.peak = 0

    def add(self, tensors: Iterable[Any]) -> None:
        """Adds those of tensors, each storage once."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                self.known.add(tensor.untyped_storage())
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.known))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        return result


@torch.inference_mode()
def peak_bytes(model: nn.Module, image: torch.Tensor) -> int:
    """The largest sum of weights, buffers, image and activations at one time, in a forward pass of (B, C, H, W).

    Memory that a kernel uses inside is not counted.
    """
    storages = _Storages()
    storages.add([*model.parameters(), *model.buffers(), image])
    with storages:
        model(image)
    return storages.peak


def to_table(costs: Mapping[str, Costs], quality: Mapping[str, Quality]) -> Table:
    """The original beside the shared model, before and after training; `quality` as in `write_report`."""
    table = Table("", *(name if name == "original" else f"shared, {name}" for name in quality), box=None)
    each = [costs["original" if name == "original" else "shared"] for name in quality]
    table.add_row("parameters", *(f"{cost.parameters:,}" for cost in each))
    table.add_row("weights", *(format_bytes(cost.weight_bytes) for cost in each))
    table.add_row("peak memory (1 image)", *(format_bytes(cost.peak_bytes) for cost in each))
    table.add_row("MACs, millions", *(f"{cost.macs / 1e6:,.1f}" for cost in each))
    table.add_row("latency, ms (1 image)", *(f"{cost.latency_ms:.2f}" for cost in each))
    table.add_row("its quartiles, ms", *("{:.2f} to {:.2f}".format(*cost.latency_quartiles_ms) for cost in each))
    table.add_row("top-1, %", *(f"{one.top1:.2f}" for one in quality.values()))
    table.add_row("agreement, %", *(f"{one.agreement:.2f}" for one in quality.values()))
    return table


def write_report(
    out: Path,
    about: Mapping[str, Any],
    costs: Mapping[str, Costs],
    quality: Mapping[str, Quality],
    rows: Sequence[Mapping[str, float]],
) -> None:
    """Writes `report.json` and `report.png` to a folder.

    Args:
        about: what was measured: model, data, number of images, device, versions.
        costs: of "original" and "shared".
        quality: of "original", and of the shared model "before" and, if it was trained, "after".
        rows: metrics of each epoch.
    """
    values = {
        **about,
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "quality": {name: asdict(one) for name, one in quality.items()},
        "epochs": list(rows),
    }
    write_atomically(out / "report.json", (json.dumps(values, indent=2) + "\n").encode())
    _draw(out / "report.png", str(about["title"]), costs, quality, rows)


def _draw(
    path: Path,
    title: str,
    costs: Mapping[str, Costs],
    quality: Mapping[str, Quality],
    rows: Sequence[Mapping[str, float]],
) -> None:
    from matplotlib import pyplot as plt

    panels = 3 if rows else 2
    figure, axes = plt.subplots(1, panels, figsize=(1 + 4 * panels, 4), layout="constrained")
    sizes, bars, *others = axes
    figure.suptitle(title)
    original, shared = costs["original"], costs["shared"]
    pairs = {
        f"parameters\n(of {original.parameters / 1e6:.2f} M)": shared.parameters / original.parameters,
        f"memory\n(of {format_bytes(original.peak_bytes)})": shared.peak_bytes / original.peak_bytes,
        f"MACs\n(of {original.macs / 1e6:,.1f} M)": shared.macs / original.macs,
        f"latency\n(of {original.latency_ms:.2f} ms)": shared.latency_ms / original.latency_ms,
    }
    drawn = sizes.bar(list(pairs), [100 * value for value in pairs.values()], color="tab:blue")
    sizes.bar_label(drawn, fmt="%.0f %%", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0}, padding=2)
    sizes.axhline(100, color="grey", linestyle=":", zorder=0)
    sizes.set_ylim(0, 115 * max(1, *pairs.values()))
    sizes.set(ylabel="% of the original", title="Costs of the shared model")
    places = range(len(quality))
    for shift, name, color in ((-0.2, "top1", "tab:orange"), (0.2, "agreement", "tab:green")):
        values = [getattr(one, name) for one in quality.values()]
        drawn = bars.bar([place + shift for place in places], values, 0.4, color=color)
        drawn.set_label("top-1" if name == "top1" else name)
        bars.bar_label(drawn, fmt="%.1f")
    bars.set_xticks(list(places), ["original", "shared, before", "shared, after"][: len(quality)])
    bars.set(ylabel="%", ylim=(0, 130), yticks=range(0, 101, 20), title="Test images")
    bars.legend(loc="upper center", ncols=2)
    for curves in others:
        for name in ("predictions", "features"):
            curves.plot([row["epoch"] for row in rows], [row[name] for row in rows], marker="o", label=name)
        curves.set(xlabel="epoch", ylabel="training loss", title="Distillation")
        curves.set_xlim(0.5, len(rows) + 0.5)
        curves.xaxis.get_major_locator().set_params(integer=True)
        curves.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)
