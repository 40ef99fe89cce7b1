"""Reads and writes the folder of a training run, which only the same recipe may resume and nothing overwrites."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from sret.checkpoints.card import Card, save_weights
from sret.checkpoints.state import digest_of_state, load_state, save_state
from sret.data.dataset import ImageData
from sret.errors import InputError, describe_changes, first_few
from sret.files import STATE, sha256_of, write_atomically
from sret.ranges import fits
from sret.training.config import TrainConfig, resume_key

BEST, LAST, METRICS = "best.safetensors", "last.safetensors", "metrics.jsonl"
REPORT = "report.png"
CONTENTS = (BEST, LAST, STATE, METRICS, REPORT)
STATE_TYPES: dict[str, Any] = {
    "config": dict[str, Any],
    "sources": dict[str, Any],
    "step": int,
    "total_steps": int,
    "sums": dict[str, float],
    "rows": list[dict[str, float]],
    "best": dict[str, float] | None,
    "best_predictions": dict[str, Tensor] | None,
    "unreadable": list[str],
    "model": dict[str, Tensor],
    "ema": dict[str, Tensor] | None,
    "optimizer": dict[str, Any],
    "scaler": dict[str, float] | None,
}


def sources_of(config: TrainConfig, data: ImageData) -> dict[str, Any]:
    """Fingerprints of what a recipe names: its data, and the files of its teacher."""
    prints: dict[str, Any] = {"data": data.fingerprint()}
    if config.soft_labels is not None:
        prints["soft_labels"] = sha256_of(config.soft_labels / "manifest.json")
    if config.distillation is not None:
        for name in (config.distillation.teacher, config.distillation.teacher_weights):
            if name is not None and Path(name).is_file():
                prints[str(name)] = sha256_of(Path(name))
    return prints


def find_state(
    out: Path, config: TrainConfig, data: ImageData, sources: dict[str, Any], may_resume: bool
) -> dict[str, Any] | None:
    """The saved state of the run in `out`, or None if the folder has no run.

    Raises `InputError` if the folder has files that would be overwritten, a run of another recipe, or a run whose data
    or teacher have changed.
    """
    if not (out / STATE).exists():
        if present := [name for name in CONTENTS if (out / name).exists()]:
            raise InputError(f"{out} has {', '.join(present)} of another run, but no state; choose another --out")
        return None
    state = load_state(out / STATE)
    odd = [name for name, hint in STATE_TYPES.items() if name not in state or not fits(state[name], hint)]
    odd += [name for name in ("config", "sources") if name not in odd and not _is_plain(state[name])]
    if odd or not isinstance(state["config"].get("model"), dict):
        text = f"is not the state of a run of this version of sret ({first_few(odd or ['config'])})"
        raise InputError(f"{out / STATE} {text}; choose another --out")
    if state["step"] == 0:
        return None  # no step was done
    further = f"to train its weights further, use --init {out / LAST} and another --out"
    if not may_resume:
        is_finished = state["step"] == state["total_steps"]
        raise InputError(
            f"{out} already has a run (step {state['step']} of {state['total_steps']}); "
            f"{'it is finished: ' if is_finished else 'add --resume auto to continue it, or '}choose another --out"
            f"{'; ' + further if is_finished else ''}"
        )
    if changed := describe_changes(resume_key(state["config"]), resume_key(config.to_dict())):
        if [phrase.split()[0] for phrase in changed] == ["epochs"]:
            raise InputError(
                f"{out}: {changed[0]}; this changes the learning rate of every step, so the run cannot be continued; "
                f"{further}"
            )
        raise InputError(f"{out} was started with another recipe: {first_few(changed)}; choose another --out")
    for name, before in state["sources"].items():
        if changed := describe_changes({"content": before}, {"content": sources.get(name)}):
            what = data.name if name == "data" else name
            phrases = [phrase.removeprefix("content.") for phrase in changed]
            raise InputError(f"{what} has changed since {out} was started: {first_few(phrases)}; choose another --out")
    return state


def _is_plain(value: object) -> bool:
    """Whether a value is one of JSON's types, with what it contains."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, str | float | int | None)


def save_run(out: Path, state: dict[str, Any], card: Card, before: str) -> str:
    """Writes the files of the run, the state last, so that a state always belongs to files that are complete.

    Writes the best weights too if the last row of metrics is the best one. Weights are those of the moving average if
    there is one.

    Args:
        before: the digest of the state that this run wrote or loaded last.

    Returns the digest of the new state.
    Raises `InputError` if the files cannot be written, or another run has written to them; the files of the last save
    then stay complete.
    """
    if digest_of_state(out / STATE) not in ("", before):
        raise InputError(
            f"{out}: another run has written to this folder; its files are kept, and this run's state of step "
            f"{state['step']} is not saved; start it again with another --out"
        )
    try:
        return _save(out, state, card)
    except OSError as error:
        hint = "--resume auto continues from the last saved state"
        raise InputError(
            f"{out}: the state of step {state['step']} could not be saved ({error.strerror or error}); "
            f"{hint if state['step'] else 'choose another --out'}"
        ) from error


def _save(out: Path, state: dict[str, Any], card: Card) -> str:
    weights: dict[str, Tensor] = state["ema"] or state["model"]
    rows = state["rows"]
    if state["step"]:  # at step 0 only the state is written, to reserve the folder
        save_weights(out / LAST, weights, card)
        if rows and rows[-1] == state["best"] and rows[-1]["step"] == state["step"]:
            save_weights(out / BEST, weights, card)
        write_atomically(out / METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return save_state(out / STATE, state)
