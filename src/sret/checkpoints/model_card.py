"""Writes the model card of a repository: how to load the model, its results with their data, its licence."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sret.checkpoints.card import Card
from sret.errors import printable
from sret.models.cost import model_cost
from sret.models.sret import SReT

PAPER = "[Sliced Recursive Transformer](https://arxiv.org/abs/2111.05297) (Shen, Liu, Xing, ECCV 2022)"
MAX_CLASSES_SHOWN = 50


@dataclass(frozen=True, kw_only=True)
class Result:
    """A measured top-1 accuracy.

    Attributes:
        data, split: the images of the measurement.
        top1: in percent.
        count: number of images; None if unknown.
        low, high: the 95 % interval of `top1`, in percent; None if the number of images is unknown.
        remark: how the accuracy was chosen, if it was chosen.
    """

    data: str
    split: str
    top1: float
    count: int | None = None
    low: float | None = None
    high: float | None = None
    remark: str = ""


def model_card(model: SReT, card: Card, repo: str, results: Sequence[Result], license_name: str | None) -> str:
    """The text of README.md: metadata in YAML, then Markdown."""
    cost = model_cost(model.config)
    height, width = card.preprocessing.img_size
    classes = ", ".join(_plain(name) for name in card.class_names[:MAX_CLASSES_SHOWN])
    more = f", ... ({len(card.class_names) - MAX_CLASSES_SHOWN} more)" * (len(card.class_names) > MAX_CLASSES_SHOWN)
    lines = [
        f"# {repo}",
        "",
        f"A recursive vision transformer, {PAPER}: {cost.parameters:,} parameters, {model.config.depth} layers, "
        f"{cost.macs / 1e6:,.1f} M multiply-adds for a {height}x{width} image.",
        "",
        "## Use",
        "",
        "Clone the repository of `sret` and run in its folder: `pip install -e '.[train,data]'`.",
        "",
        "```python",
        "import sret, timm  # importing sret registers its models with timm",
        "",
        f'model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()',
        "```",
        "",
        "```sh",
        f"sret predict photos --checkpoint hf-hub:{repo}",
        f"sret train --config recipes/custom.yaml --data photos --init hf-hub:{repo} --out runs/photos",
        "```",
        "",
        *([f"{model.num_classes} classes: {classes}{more}."] if classes else [f"{model.num_classes} classes."]),
        "",
        "## Results",
        "",
        *_table(results),
        "",
        "## Training",
        "",
        *_training(card.training),
        "",
        "## Licence",
        "",
        f"Weights: {license_name or 'not stated; ask the owner of this repository'}. Code of `sret`: MIT.",
        "",
    ]
    return "\n".join([*_metadata(repo, results, license_name), *lines])


def _table(results: Sequence[Result]) -> list[str]:
    if not results:
        return ["Not measured."]
    rows = ["| data | split | images | top-1, % | 95 % interval | |", "|---|---|---:|---:|---:|---|"]
    for r in results:
        count = "unknown" if r.count is None else f"{r.count:,}"
        interval = "unknown" if r.low is None or r.high is None else f"{r.low:.1f} to {r.high:.1f}"
        rows.append(f"| {_plain(r.data)} | {r.split} | {count} | {r.top1:.2f} | {interval} | {_plain(r.remark)} |")
    return rows


def _training(training: dict[str, Any]) -> list[str]:
    if source := training.get("converted_from"):
        return [f"Converted from the authors' file {_plain(str(source))}."]
    recipe = {key: value for key, value in training.get("recipe", {}).items() if key != "model" and value is not None}
    if not recipe:
        return ["Unknown."]
    versions = ", ".join(f"{name} {version}" for name, version in training.get("versions", {}).items() if version)
    return ["By this recipe:", "", "```json", json.dumps(recipe, indent=1), "```", "", f"Versions: {_plain(versions)}."]


def _metadata(repo: str, results: Sequence[Result], license_name: str | None) -> list[str]:
    """The YAML that the hub reads. JSON is YAML, and quotes whatever a name holds."""
    metadata: dict[str, Any] = {
        "library_name": "timm",
        "license": license_name or "other",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "sret"],
    }
    if results:
        measured = [
            {
                "task": {"type": "image-classification"},
                "dataset": {"type": "image-classification", "name": printable(r.data), "split": r.split},
                "metrics": [{"type": "accuracy", "value": round(r.top1, 2), "name": "top-1, %"}],
            }
            for r in results
        ]
        metadata["model-index"] = [{"name": repo.rpartition("/")[2], "results": measured}]
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in metadata.items()), "---", ""]


def _plain(text: str) -> str:
    """Text without what Markdown would read as its own."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in printable(text))
