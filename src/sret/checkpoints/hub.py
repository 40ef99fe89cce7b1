"""Uploads models to the Hugging Face Hub, and downloads them: `hf-hub:owner/name`.

A repository holds `model.safetensors` (a weights file of sret, which timm reads too), `config.json` (for
`timm.create_model`) and `README.md` (the model card).
"""

import json
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, errors, hf_hub_download
from huggingface_hub.utils import logging

from sret.checkpoints.card import Card, save_weights
from sret.checkpoints.model_card import Result, model_card
from sret.errors import InputError
from sret.models.sret import SReT
from sret.models.variants import architecture_of
from sret.network import hub_cache_if_unreachable, hub_host, is_unreachable

PREFIX = "hf-hub:"
WEIGHTS, CONFIG, README = "model.safetensors", "config.json", "README.md"


def is_hub(source: str | os.PathLike[str]) -> bool:
    """Whether this names a repository of the hub, and not a file."""
    return os.fspath(source).startswith(PREFIX)


def fetch_hub(source: str | os.PathLike[str]) -> Path:
    """The local copy of the weights of `hf-hub:owner/name` or `hf-hub:owner/name@revision`.

    Raises `InputError` if they cannot be downloaded.
    """
    name = os.fspath(source)
    repo, _, revision = name.removeprefix(PREFIX).partition("@")
    with _explained(name, "give the path of a weights file instead"), hub_cache_if_unreachable():
        return Path(hf_hub_download(repo, WEIGHTS, revision=revision or None))


def write_folder(
    folder: Path, model: SReT, card: Card, repo: str, results: Sequence[Result], license_name: str | None
) -> None:
    """Writes the files of a repository. Raises `InputError` for a fused model."""
    card.check_unfused("the checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    public = replace(card, training=without_folders(card.training))
    save_weights(folder / WEIGHTS, model.state_dict(), public)
    (folder / CONFIG).write_text(json.dumps(timm_config(model, card), indent=2), encoding="utf-8")
    (folder / README).write_text(model_card(model, public, repo, results, license_name), encoding="utf-8")


def timm_config(model: SReT, card: Card) -> dict[str, Any]:
    """The `config.json` from which timm creates the model, for its images and its classes."""
    architecture, arguments = architecture_of(model.config)
    about = {key: value for key, value in model.pretrained_cfg.items() if value is not None and key != "label_names"}
    names = {"label_names": list(card.class_names)} if card.class_names else {}
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        **names,
        "model_args": arguments,
        "pretrained_cfg": about,
    }


def without_folders(values: Any) -> Any:
    """Nested plain values with the last part of absolute paths in place of the whole, which is private."""
    if isinstance(values, dict):
        return {key: without_folders(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [without_folders(value) for value in values]
    return Path(values).name if isinstance(values, str) and os.path.isabs(values) else values


def push(folder: Path, repo: str, is_private: bool) -> str:
    """Creates the repository if it is missing, uploads the folder, and returns the address.

    Raises `InputError` without permission or network.
    """
    api = HfApi(library_name="sret")
    with _explained(repo, "--out FOLDER writes the files to a folder instead"), hub_cache_if_unreachable():
        api.create_repo(repo, private=is_private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Model of sret").commit_url)


def check_repo(repo: str) -> None:
    """Raises `InputError` if this is not the name of a repository."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII):
        raise InputError(f"{repo!r} is not a repository of the hub; write owner/name")


@contextmanager
def _explained(name: str, offline_advice: str) -> Iterator[None]:
    """Turns errors of huggingface_hub, and of those it calls, into one line that says what would work."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would print every attempt
    try:
        yield
    except Exception as error:  # of huggingface_hub, httpx or the file system: they share no base class
        if is_unreachable(error):
            raise InputError(f"{name}: no connection to {hub_host()}; {offline_advice}") from error
        hint = ""
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            hint = f"; the repository has no {WEIGHTS}; `sret push` and timm's push_to_hf_hub write one"
        elif isinstance(error, errors.HfHubHTTPError | errors.LocalTokenNotFoundError):
            hint = "; look it up at https://huggingface.co, and if it needs permission, run: hf auth login"
        reason = textwrap.shorten(str(error), 300) or type(error).__name__
        raise InputError(f"{name}: {reason.rstrip('.')}{hint}") from error
    finally:
        logging.set_verbosity(verbosity)
