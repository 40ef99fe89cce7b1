"""Checks a saved state before a run resumes from it: types, keys, shapes and ranges of everything in it."""

import json
import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from sret.checkpoints.fit import check_fit
from sret.data.loading import UNREADABLE
from sret.errors import InputError, error_prefix, first_few
from sret.inference.evaluate import Metrics
from sret.models.build import everywhere
from sret.ranges import fits
from sret.training.metrics import epoch_row
from sret.training.setup import Setup

Setting = None | bool | float | str | list[float] | tuple[float, ...] | list[str]  # of an optimizer


def check_values(setup: Setup, found: dict[str, Any]) -> None:
    """Raises `InputError` if a state, whose types are right, is not one that this run could have saved."""
    step = found["step"]
    if found["total_steps"] != setup.total_steps or not 0 < step <= setup.total_steps:
        raise InputError(f"step {step} of {found['total_steps']}, but the recipe has {setup.total_steps} steps")
    for name, now in (("ema", setup.ema), ("scaler", setup.accelerator.scaler)):
        if (found[name] is None) != (now is None):
            raise InputError(f"{name} is {'missing' if found[name] is None else 'not part of the recipe'}")
    with error_prefix("model"):
        check_fit(everywhere(setup.model, found["model"]), setup.model)
    if setup.ema is not None:
        with error_prefix("ema"):
            check_fit(everywhere(setup.model, found["ema"]), setup.ema.module)
    _check_metrics(setup, found)
    _check_predictions(setup, found)
    _check_optimizer(setup, found["optimizer"], step)


def _check_metrics(setup: Setup, found: dict[str, Any]) -> None:
    rows, best, sums = found["rows"], found["best"], found["sums"]
    if sums.keys() != {"loss", "accuracy", "seconds"} or not all(0 <= value < math.inf for value in sums.values()):
        raise InputError(f"the sums of the epoch are {sums}")
    measured = dict.fromkeys(["val"] if setup.ema is None else ["val", "ema"], Metrics(0.0, 0.0, 0.0, 1))
    names = epoch_row(1, 1, 1, 0.0, dict.fromkeys(sums, 1.0), measured).keys()
    done = found["step"] // setup.epoch_steps
    expected = [(i + 1, (i + 1) * setup.epoch_steps) for i in range(len(rows))]
    if not done - 1 <= len(rows) <= done or [(row.get("epoch"), row.get("step")) for row in rows] != expected:
        raise InputError(f"{len(rows)} rows of metrics do not belong to {done} epochs")
    if any(row.keys() != names for row in rows) or not (best is None or best in rows):
        raise InputError("its rows of metrics have other names, or the best one is not among them")


def _check_predictions(setup: Setup, found: dict[str, Any]) -> None:
    predictions, count = found["best_predictions"], len(setup.data.split("val"))
    if (predictions is None) != (found["best"] is None):
        raise InputError("the best epoch has no predictions, or the predictions have no epoch")
    if predictions is None:
        return
    limits = {"labels": UNREADABLE, "classes": 0, "confidences": 0}
    last = {"confidences": 1}
    for name, lowest in limits.items():
        values = predictions.get(name, torch.empty(0))
        highest = last.get(name, len(setup.data.class_names) - 1)
        if values.shape != (count,) or not ((values >= lowest) & (values <= highest)).all():
            raise InputError(f"the {name} of the best predictions are not those of {count} images")


def _check_optimizer(setup: Setup, found: dict[str, Any], step: int) -> None:
    """Refuses another state than that of the recipe's optimizer after some steps."""
    parameters = {name: p for name, p in setup.model.named_parameters() if p.requires_grad}
    state: dict[str, dict[str, Tensor]] = found.get("state", {})
    if not fits(state, dict[str, dict[str, Tensor]]) or not fits(found.get("param_groups"), list[dict[str, Any]]):
        raise InputError("optimizer: no state of an optimizer")
    missing = [name for name in parameters if name not in state]
    if missing and setup.has_run_all_passes(step):
        raise InputError(f"optimizer: no state of {first_few(missing)}")
    name_of = {parameter: name for name, parameter in parameters.items()}
    own = [{**group, "params": [name_of[p] for p in group["params"]]} for group in setup.optimizer.param_groups]
    steps = [group["step"] for group in found["param_groups"] if "step" in group]  # LAMB counts them here
    if (
        _settings(found["param_groups"]) != _settings(own)
        or not all(fits(group.get("lr"), float) for group in found["param_groups"])  # the schedule sets its value
        or not all(isinstance(n, Tensor) and torch.equal(n, torch.tensor(float(step))) for n in steps)
    ):
        raise InputError("optimizer: its settings are not those of the recipe")
    example = _example_state(setup.config.optimizer)
    for name, values in state.items():
        shape = parameters[name].shape if name in parameters else None
        # torch's fused kernels do not compare sizes: a wrong one would overwrite other memory.
        expected = {key: (x.dtype, shape if x.ndim else x.shape) for key, x in example.items()}
        if {key: (x.dtype, x.shape) for key, x in values.items()} != expected:
            raise InputError(f"optimizer: the state of {name} is not that of such a weight")
        if not all(x.isfinite().all() for x in values.values()):
            raise InputError(f"optimizer: the state of {name} is not finite")


def _settings(groups: list[dict[str, Any]]) -> str | None:
    """What is constant in an optimizer's groups, as JSON, in which tuples are lists, as torch returns them.

    None if there are values of other types.
    """
    constant = [{name: value for name, value in group.items() if name not in ("lr", "step")} for group in groups]
    return json.dumps(constant, sort_keys=True) if fits(constant, list[dict[str, Setting]]) else None


def _example_state(optimizer: str) -> dict[str, Tensor]:
    """What an optimizer stores for a weight: tensors of its shape, and scalars."""
    layer = nn.Linear(1, 1)
    stepped = create_optimizer_v2(layer, opt=optimizer)
    layer(torch.ones(1, 1)).sum().backward()
    stepped.step()
    return dict(stepped.state[layer.weight])
