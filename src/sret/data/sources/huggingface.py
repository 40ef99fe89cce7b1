"""Loads parquet files and data sets of the Hugging Face Hub, with the datasets library.

The library writes what it reads as Arrow files to its cache (HF_HOME or HF_DATASETS_CACHE) and maps them into memory,
so images stay on disk, encoded, until they are accessed.
"""

import glob
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sret.data.dataset import ImageData, Samples
from sret.data.preprocess import Encoded
from sret.data.sources.folder import SPLIT_NAMES
from sret.data.sources.webdataset import numbered
from sret.errors import InputError, InputWarning, first_few, plural
from sret.network import hub_cache_if_unreachable, hub_host, is_unreachable

if TYPE_CHECKING:
    from datasets import Dataset, Features

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "fine_labels", "class", "class_id", "target", "targets", "cls")
HIDDEN = -1  # the label of test images whose labels are not public


def load_hub(name: str) -> ImageData:
    """The data set `hf:owner/name`, or one of its configurations, `hf:owner/name@config`.

    Raises `InputError` if it cannot be loaded, or does not hold labelled images.
    """
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@(.+))?", name)
    if match is None:
        raise InputError(f"no data {name!r}: write a Hugging Face data set as hf:owner/name or hf:owner/name@config")
    from datasets import load_dataset

    with _explained(name), hub_cache_if_unreachable():
        # The long form of the name; the short one would load a local folder of that name instead.
        parts = load_dataset(f"hf://datasets/{match[1]}", match[2])
    parts = _by_split(name, parts)
    return _image_data(name, {split: (part, Columns.of(name, part.features)) for split, part in parts.items()})


def load_parquet(path: Path, files: dict[str, list[Path]]) -> ImageData:
    """Local parquet files, per split, with a column of images and one of labels.

    Raises `InputError` for files that cannot be read, or that differ in their columns or in their classes.
    """
    from datasets import Features, load_dataset
    from pyarrow import parquet

    parts = {}
    for split, paths in files.items():
        columns = {}
        for file in paths:  # the library would use the classes of the first file for all files
            with _explained(str(file)):
                features = Features.from_arrow_schema(parquet.read_schema(file))
            columns[file] = Columns.of(str(file), features)
            if columns[file] != columns[paths[0]]:
                raise InputError(f"{path}: {paths[0].name} and {file.name} differ in their columns or their classes")
        first = columns[paths[0]]
        with _explained(str(path if len(paths) > 1 else paths[0])):
            patterns = [glob.escape(str(file.resolve())) for file in paths]
            part = load_dataset("parquet", data_files=patterns, split="train", columns=[first.image, first.label])
        parts[split] = part, first
    return _image_data(str(path), parts)


@dataclass(frozen=True)
class Columns:
    """The columns of a table that hold its images and labels.

    Attributes:
        class_names: None if the labels are plain numbers.
    """

    image: str
    label: str
    class_names: tuple[str, ...] | None

    @classmethod
    def of(cls, name: str, features: "Features") -> "Columns":
        """Raises `InputError` listing the columns if it is not clear which to use."""
        from datasets import ClassLabel, Image, Value

        kinds = {c: f.dtype if isinstance(f, Value) else type(f).__name__ for c, f in features.items()}
        columns = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
        images = [c for c, feature in features.items() if isinstance(feature, Image)]
        # Files not written by the datasets library have the same columns without the type Image.
        images = images or [c for c, feature in features.items() if isinstance(feature, dict) and "bytes" in feature]
        classes = [c for c, feature in features.items() if isinstance(feature, ClassLabel)]
        numbers = [c for c, kind in kinds.items() if kind.startswith(("int", "uint"))]
        image = _named(images, IMAGE_COLUMNS) or _only(images)
        # Classes in a column of another name come last: next to a label they may mean something else.
        label = _named(classes, LABEL_COLUMNS) or _named(numbers, LABEL_COLUMNS) or _only(classes)
        if image is None:
            which = "more than one column" if images else "no column"
            raise InputError(f"{name}: {which} of images (encoded, of the type Image); its columns: {columns}")
        if label is None:
            raise InputError(
                f"{name}: no column of labels; it needs the type ClassLabel, or whole numbers and the name "
                f"{' or '.join(LABEL_COLUMNS)}; its columns: {columns}"
            )
        return cls(image, label, tuple(features[label].names) if label in classes else None)


def _named(candidates: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in candidates), None)


def _only(candidates: Sequence[str]) -> str | None:
    return candidates[0] if len(candidates) == 1 else None


class Rows(Sequence[Encoded | Path]):
    """The images of a table, each read on access. Pickling stores only the names of the mapped files."""

    def __init__(self, dataset: "Dataset", column: str, name: str) -> None:
        self.dataset, self.column, self.name = dataset, column, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Encoded | Path:  # type: ignore[override]  # no slices
        value = self.dataset[int(i)][self.column] or {}
        if value.get("bytes") is None and value.get("path"):  # the table stores paths
            return Path(value["path"])
        return Encoded(f"{self.name}, row {i}", value.get("bytes") or b"")


def _image_data(name: str, parts: "dict[str, tuple[Dataset, Columns]]") -> ImageData:
    given = {split: _samples(f"{name}, {split}", part, columns) for split, (part, columns) in parts.items()}
    given = {
        split: samples
        for split, samples in given.items()
        if split != "test" or len(given) == 1 or set(samples.labels) != {HIDDEN}
    }
    first, *others = given
    names = parts[first][1].class_names
    for split in others:
        _same_classes(name, first, names, split, parts[split][1].class_names)
    return ImageData.of(name, given, numbered(name, given) if names is None else names)


def _samples(name: str, part: "Dataset", columns: Columns) -> Samples:
    from datasets import Image

    labels = part.data.column(columns.label)  # of the Arrow table, so that images are not read
    if labels.null_count:
        raise InputError(f"{name}: {labels.null_count} of {len(labels)} rows have no {columns.label}")
    images = part.select_columns([columns.image])
    if isinstance(part.features[columns.image], Image):
        images = images.cast_column(columns.image, Image(decode=False))
    return Samples(Rows(images, columns.image, name), labels.to_pylist())


def _same_classes(
    name: str, first: str, names: tuple[str, ...] | None, split: str, others: tuple[str, ...] | None
) -> None:
    if names == others:
        return
    if names is None or others is None:
        what = f"{first if others is None else split} names its classes, {split if others is None else first} does not"
    elif odd := sorted(set(names) ^ set(others)):
        what = f"{first} and {split} differ in their classes: {first_few(odd)}"
    else:
        what = f"{first} and {split} have the same classes in a different order"
    raise InputError(f"{name}: {what}")


def _by_split(name: str, parts: "dict[str, Dataset]") -> "dict[str, Dataset]":
    """The parts under our names of splits. Raises `InputError` if it is not clear which is which."""
    found: dict[str, str] = {}
    for split, words in SPLIT_NAMES.items():
        theirs = [part for part in parts if part.lower() in words]
        if len(theirs) > 1:
            raise InputError(f"{name}: has both {' and '.join(theirs)}; only one of them can be used")
        if theirs:
            found[split] = theirs[0]
    if not found and len(parts) == 1:
        found["all"] = next(iter(parts))
    if not found:
        raise InputError(f"{name}: none of its splits is called train, validation or test; it has {', '.join(parts)}")
    if unused := [part for part in parts if part not in found.values()]:
        text = f"{name}: not used: {plural('split', len(unused))} {first_few(unused)}"
        warnings.warn(text, InputWarning, stacklevel=3)
    return {split: parts[theirs] for split, theirs in found.items()}


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns errors of the datasets library, and of those it calls, into one line that says what would work."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        yield
    except ImportError:  # something is not installed: the command line says what to install
        raise
    except Exception as error:  # of datasets, huggingface_hub, httpx, pyarrow or fsspec: they share no base class
        if is_unreachable(error):
            text = f"{name}: no connection to {hub_host()}; give a folder with the parquet files of the data set"
            raise InputError(text) from error
        hint = ""
        if isinstance(error, DatasetNotFoundError):
            hint = (
                "; look it up at https://huggingface.co/datasets, and if it is private or gated, ask for access there, "
                "then run: hf auth login"
            )
        elif "Config name is missing" in str(error) or "BuilderConfig" in str(error):
            hint = "; write hf:owner/name@config"
        elif isinstance(error, PermissionError):
            hint = "; HF_HOME sets the cache folder of the datasets library"
        # DatasetGenerationError says only that there was an error.
        cause = (isinstance(error, DatasetGenerationError) and error.__cause__) or error
        reason = textwrap.shorten(str(cause), 400) or type(cause).__name__
        raise InputError(f"{name}: {reason.rstrip('.')}{hint}") from error
