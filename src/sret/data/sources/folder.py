"""A folder with a sub-folder of images per class, or with `train` and `val` (and `test`) folders that have them."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sret.data.dataset import ImageData, Samples
from sret.errors import InputError, first_few

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test",)}


def load_folder(root: Path) -> ImageData:
    """Raises `InputError` for classes without images, and for splits that differ in their classes."""
    folders: dict[str, Path] = {}
    for split, names in SPLIT_NAMES.items():
        # A folder of classes, that is; a class may be called "train" as well.
        divided = [root / name for name in names if any(path.is_dir() for path in root.glob(f"{name}/*"))]
        if len(divided) > 1:
            raise InputError(f"{root} has both {divided[0].name} and {divided[1].name}; remove one")
        if divided:
            folders[split] = divided[0]
    for name in (name for names in SPLIT_NAMES.values() for name in names) if folders else ():
        if root / name not in folders.values() and any(
            p.suffix.lower() in IMAGE_SUFFIXES for p in root.glob(f"{name}/*")
        ):
            sorted_one = next(iter(folders.values()))
            raise InputError(
                f"{root / name}: its images lie loose; sort them into a folder per class, as {sorted_one} is"
            )
    if "train" not in folders and "val" not in folders:
        folders = {"all": root}
    found = {split: _read_classes(folder) for split, folder in folders.items()}
    first, (class_names, _) = next(iter(found.items()))
    for split, (names, _) in found.items():
        if names != class_names:
            odd = sorted(set(names) ^ set(class_names))
            raise InputError(f"{root}: {first} and {split} differ in their classes: {first_few(odd)}")
    return ImageData.of(str(root), {split: samples for split, (_, samples) in found.items()}, class_names)


class Files(Sequence[Path]):
    """Files below a folder. Their names are one array, not a million objects that loading processes would copy."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        self.names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Path:  # type: ignore[override]  # no slices
        return self.root / os.fsdecode(self.names[i])


def _read_classes(folder: Path) -> tuple[tuple[str, ...], Samples]:
    class_names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."))
    if not class_names:
        raise InputError(
            f"{folder}: no sub-folders; there should be one per class, with that class's images (or .parquet files, "
            "or WebDataset .tar files)"
        )
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = (path for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        files = sorted(path for path in found if path.is_file() and path.name[0] != ".")  # macOS leaves ._NAME.jpg
        if not files:
            raise InputError(f"{folder / name}: no images; remove the folder, or put images of that class in it")
        names += [str(path.relative_to(folder)) for path in files]
        labels += [label] * len(files)
    return class_names, Samples(Files(folder, names), labels, ["/".join(Path(name).parts[-2:]) for name in names])
