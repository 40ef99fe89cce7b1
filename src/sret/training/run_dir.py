"""A training run's folder: claimed before the first step, resumed only by what began it, never overwritten."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from sret.checkpoints.card import Card, load_state, save_state, save_weights
from sret.data.dataset import ImageData
from sret.errors import InputError, describe_changes, first_few
from sret.files import sha256_of, write_atomically
from sret.training.config import TrainConfig, decisive

BEST, LAST, STATE, METRICS = "best.safetensors", "last.safetensors", "state.pt", "metrics.jsonl"
REPORT = "report.png"
CONTENTS = (BEST, LAST, STATE, METRICS, REPORT)
STATE_KEYS = {
    *("config", "sources", "step", "total_steps", "sums", "rows", "best", "best_predictions", "unreadable"),
    *("model", "ema", "optimizer", "scaler"),
}


def sources_of(config: TrainConfig, data: ImageData) -> dict[str, Any]:
    """What a recipe names, told apart by content: its data, and the files of its teacher."""
    prints: dict[str, Any] = {"data": data.fingerprint()}
    if config.soft_labels is not None:
        prints["soft_labels"] = sha256_of(config.soft_labels / "manifest.json")
    if config.distillation is not None:
        for name in (config.distillation.teacher, config.distillation.teacher_weights):
            if name is not None and Path(name).is_file():
                prints[str(name)] = sha256_of(Path(name))
    return prints


def find(
    out: Path, config: TrainConfig, data: ImageData, sources: dict[str, Any], may_resume: bool
) -> dict[str, Any] | None:
    """The state of the run in `out` to go on from, or None if the folder is free.

    Raises `InputError` if the folder holds anything that would be overwritten, another recipe's run, or a run on
    sources that have changed since.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; --out names a folder")
    data.refuse_inside(out)
    if not (out / STATE).exists():
        if present := [name for name in CONTENTS if (out / name).exists()]:
            raise InputError(f"{out} holds {', '.join(present)} of another run, without its state; name another --out")
        return None
    state = load_state(out / STATE)
    if state.get("step") == 0:
        return None  # nothing was done yet that could be lost
    if not state.keys() >= STATE_KEYS:
        raise InputError(f"{out / STATE} is not the state of a run of this version of sret; name another --out")
    if not may_resume:
        is_finished = state["step"] == state["total_steps"]
        raise InputError(
            f"{out} holds a run already (step {state['step']} of {state['total_steps']}); "
            f"{'it is finished: ' if is_finished else 'add --resume auto to continue it, or '}name another --out"
        )
    if changed := describe_changes(decisive(state["config"]), decisive(config.to_dict())):
        raise InputError(f"{out} was begun with another recipe: {first_few(changed)}; name another --out")
    for name, before in state["sources"].items():
        if changed := describe_changes({"content": before}, {"content": sources.get(name)}):
            what = data.name if name == "data" else name
            phrases = [phrase.removeprefix("content.") for phrase in changed]
            raise InputError(f"{what} has changed since {out} was begun: {first_few(phrases)}; name another --out")
    return state


def save(out: Path, state: dict[str, Any], card: Card) -> None:
    """Writes the run's files, the state last, so that whatever it speaks of is there already.

    `state` holds the model's weights and their moving average, the rows of the metrics and the best of them; an epoch
    that has just become the best also becomes the best weights, averaged if the run averages.

    Raises `InputError` if the files cannot be written; those of the last save are then still whole.
    """
    try:
        _save(out, state, card)
    except OSError as error:
        before = "what was saved before is whole, and --resume auto goes on from it"
        raise InputError(
            f"{out}: the state of step {state['step']} could not be saved ({error.strerror or error}); "
            f"{before if state['step'] else 'name an --out that can be written to'}"
        ) from error


def _save(out: Path, state: dict[str, Any], card: Card) -> None:
    weights: dict[str, Tensor] = state["ema"] or state["model"]
    rows = state["rows"]
    if state["step"]:  # else the state alone claims the folder
        save_weights(out / LAST, weights, card)
        if rows and rows[-1] == state["best"] and rows[-1]["step"] == state["step"]:
            save_weights(out / BEST, weights, card)
        write_atomically(out / METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())
    save_state(out / STATE, state)
