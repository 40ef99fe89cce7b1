"""A folder with a sub-folder of pictures per class, or with `train` and `val` (and `test`) folders that have them."""

from pathlib import Path

from sret.data import ImageData, Samples
from sret.errors import InputError, some

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test",)}


def load_folder(root: Path) -> ImageData:
    """Raises `InputError` for classes without pictures, and for splits that differ in their classes."""
    folders: dict[str, Path] = {}
    for split, names in SPLIT_NAMES.items():
        # A folder of classes, that is; a class may be called "train" as well.
        divided = [root / name for name in names if any(path.is_dir() for path in root.glob(f"{name}/*"))]
        if len(divided) > 1:
            raise InputError(f"{root} has both {divided[0].name} and {divided[1].name}; remove one")
        if divided:
            folders[split] = divided[0]
    if "train" not in folders and "val" not in folders:
        folders = {"all": root}
    found = {split: _read_classes(folder) for split, folder in folders.items()}
    first, (class_names, _) = next(iter(found.items()))
    for split, (names, _) in found.items():
        if names != class_names:
            odd = sorted(set(names) ^ set(class_names))
            raise InputError(f"{root}: {first} and {split} differ in their classes: {some(odd)}")
    return ImageData.of(str(root), {split: samples for split, (_, samples) in found.items()}, class_names)


def _read_classes(folder: Path) -> tuple[tuple[str, ...], Samples]:
    class_names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."))
    if not class_names:
        raise InputError(f"{folder}: no sub-folders; there should be one per class, with that class's pictures")
    images: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = (path for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        files = sorted(path for path in found if path.is_file() and path.name[0] != ".")  # macOS leaves ._NAME.jpg
        if not files:
            raise InputError(f"{folder / name}: no pictures; remove the folder, or put pictures of that class in it")
        images += files
        labels += [label] * len(files)
    return class_names, Samples(images, labels, ["/".join(path.parts[-2:]) for path in images])
