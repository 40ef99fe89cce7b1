"""Loads labelled images by name: small data sets, the Hugging Face Hub, folders, parquet files, shards."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import distributed

from sret.data.dataset import ImageData
from sret.data.sources.digits import load_digits
from sret.data.sources.folder import SPLIT_NAMES, SPLIT_OF, load_folder, split_folders
from sret.data.sources.huggingface import load_hub, load_parquet
from sret.data.sources.torchvision_sets import TORCHVISION_SETS, load_torchvision
from sret.data.sources.webdataset import load_shards
from sret.errors import InputError, did_you_mean

__all__ = ["load_data"]


def load_data(name: str) -> ImageData:
    """The data set of that name.

        digits                                       1,797 images that come with scikit-learn
        cifar10, cifar100, mnist, fashion-mnist      downloaded by torchvision
        hf:owner/name, hf:owner/name@config          downloaded from the Hugging Face Hub
        a path                                       images in a folder per class, parquet files, or WebDataset shards

    Write ./mnist for a folder called `mnist`. If a source has no splits, `ImageData` makes them, always the same:
    a stratified 20 % for testing, and 15 % of the rest for validation.

    Raises `InputError` if there is no such data.
    """
    with first_on_each_machine():
        return _load(name)


@contextmanager
def first_on_each_machine() -> Iterator[None]:
    """The first process of each machine runs first, so that the others find what it downloaded or indexed."""
    is_alone = not (distributed.is_available() and distributed.is_initialized())
    is_first = is_alone or os.environ.get("LOCAL_RANK", "0") == "0"
    if not is_first:
        distributed.barrier()
    try:
        yield
    finally:  # after an error too: the other processes then raise it themselves
        if is_first and not is_alone:
            distributed.barrier()


def _load(name: str) -> ImageData:
    if name == "digits":
        return load_digits()
    if name in TORCHVISION_SETS:
        return load_torchvision(name)
    if name.startswith("hf:"):
        return load_hub(name)
    path = Path(name)
    if not name or not path.exists():
        raise InputError(f"no data {name!r}: give {_choices()}{_suggestion(name)}")
    if path.is_dir() and split_folders(path):  # a folder of ImageNet may also hold its tar files
        return load_folder(path)
    if parquet := _files_by_split(path, ".parquet"):
        return load_parquet(path, parquet)
    if shards := _files_by_split(path, ".tar"):
        return load_shards(path, shards)
    if path.is_file():
        raise InputError(f"{name}: a data file must end in .parquet or .tar; or give {_choices()}")
    return load_folder(path)


def _files_by_split(root: Path, suffix: str) -> dict[str, list[Path]]:
    """The files with that suffix in a folder, per split; as "all" if none names its split; {} if there are none.

    The split is a word of the file's name ("imagenet1k-train-0000"), or of the name of the folder it is in: `data`, or
    one called after a split. Other folders are not searched: they may hold a million images.

    Raises `InputError` for a name with two splits, and for files without a split beside files with one.
    """
    if root.is_file():
        return {"all": [root]} if root.suffix == suffix else {}
    folders = [root, root / "data"]
    folders += [folder / word for folder in folders for word in SPLIT_OF]
    files = [path for folder in folders for path in sorted(folder.glob(f"[!.]*{suffix}")) if path.is_file()]
    found: dict[str, list[Path]] = {}
    for path in files:
        found.setdefault(_split_of(path, root), []).append(path)
    if "all" in found and len(found) > 1:
        raise InputError(
            f"{root}: {found['all'][0].name} has no split in its name, but other files have; add one of "
            f"{', '.join(SPLIT_NAMES)} to its name, or move it away"
        )
    return {split: found[split] for split in (*SPLIT_NAMES, "all") if split in found}


def _split_of(path: Path, root: Path) -> str:
    for part in reversed(path.relative_to(root).parts):
        found = {SPLIT_OF[word] for word in re.findall("[a-z]+", part.lower()) if word in SPLIT_OF}
        if len(found) > 1:
            raise InputError(f"{path}: its name contains both {' and '.join(sorted(found))}; rename it")
        if found:
            return found.pop()
    return "all"


def _choices() -> str:
    return (
        f"digits, {', '.join(TORCHVISION_SETS)}, hf:owner/name of a data set on the Hugging Face Hub, or the path of a "
        "folder with a sub-folder of images per class, with .parquet files, or with WebDataset .tar files"
    )


def _suggestion(name: str) -> str:
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return f"; did you mean 'hf:{name}'?"
    return did_you_mean(name.lower(), ["digits", *TORCHVISION_SETS])
