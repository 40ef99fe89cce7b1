"""Loads WebDataset shards: tar files of images and labels, read in place and in any order.

    n01440764_10026.jpg   n01440764_10026.cls (the number of the class, as text) or .json (with a number "label")

A key is the part of a file's path before the first dot of its name, as in the webdataset package. That package reads
shards sequentially; here they are indexed once, so that shuffling is exact, a run resumes at any image, and each is
counted once. An index holds about 50 bytes per image and is stored in the user's cache.
"""

import hashlib
import json
import os
import tarfile
import warnings
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from sret.data.dataset import ImageData, Samples
from sret.data.image_files import image_suffixes
from sret.data.preprocess import Encoded
from sret.errors import InputError, InputWarning, first_few, plural
from sret.files import cache_dir, replacing
from sret.ranges import MAX_CLASSES

CLASS_FILES = ("classes.txt", "classnames.txt")
INDEX_VERSION = 1  # stored in an index; increase it when an index of the same shard changes
MAX_LABEL_BYTES = 1 << 20  # of a .cls or .json file
THREADS = 8  # they wait for the disk in parallel; without waiting, one thread would be twice as fast as eight


def load_shards(root: Path, files: dict[str, list[Path]]) -> ImageData:
    """The data set in these shards; `classes.txt` beside them may name the classes, one per line.

    Raises `InputError` for a damaged shard, and for an image without a label or a label without an image.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        shards = {split: list(pool.map(read_index, paths)) for split, paths in files.items()}
    given = {split: samples_of(parts) for split, parts in shards.items()}
    return ImageData.of(str(root), given, class_names_beside(root) or numbered(str(root), given))


def numbered(name: str, given: dict[str, Samples]) -> list[str]:
    """Class names for a source that has none: numbers from 0 to the largest label of its first split.

    Raises `InputError` for labels that only another split has. Warns of numbers without images.
    """
    seen = {split: {int(label) for label in np.unique(samples.labels)} for split, samples in given.items()}
    first, known = next(iter(seen.items()))
    for split, labels in seen.items():
        if odd := sorted(labels - known):
            few = first_few([str(label) for label in odd])
            raise InputError(f"{name}: {plural('label', len(odd))} {few} in {split}, but not in {first}")
    count = max(known, default=-1) + 1
    if count > MAX_CLASSES:
        raise InputError(f"{name}: label {count - 1} in {first}; classes are numbered from 0, without gaps")
    if 0 < len(known) < count and min(known) >= 0:
        text = (
            f"{name}: its classes have no names; assuming {count} classes, of which {count - len(known)} have no images"
        )
        warnings.warn(text, InputWarning, stacklevel=2)
    return [str(label) for label in range(count)]


def class_names_beside(root: Path) -> list[str]:
    """The lines of the file that names the classes; [] if there is no such file.

    Raises `InputError` for an empty line: it would shift the names after it.
    """
    for path in ((root.parent if root.is_file() else root) / name for name in CLASS_FILES):
        if path.is_file():
            try:
                names = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: not a text file ({error})") from error
            if "" in names or not names:
                raise InputError(f"{path}: line {names.index('') + 1 if names else 1} is empty; it should name a class")
            return names
    return []


# images ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Shard:
    """The positions of the images in a tar file: row i is an image, in the order of the file.

    Attributes:
        keys: (N,) UTF-8. Arrays, because every process that loads images would copy a million Python objects.
        offsets, sizes: (N,) in bytes.
        labels: (N,)
    """

    path: Path
    keys: NDArray[np.bytes_]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]

    def read(self, row: int) -> Encoded:
        """Raises `InputError` if the file is gone or has become shorter."""
        name = f"{self.path}: {self.keys[row].decode()}"
        try:
            # Opened for each image (10 microseconds; decoding takes thousands): forked processes must not share a file
            # position, and a thousand shards are more files than a process may have open.
            with open(self.path, "rb") as file:
                content = _read_at(file, int(self.offsets[row]), int(self.sizes[row]))
        except OSError as error:
            raise InputError(f"{name}: cannot be read ({error.strerror or error})") from error
        if len(content) < self.sizes[row]:
            raise InputError(f"{name}: cannot be read, the file became shorter since it was indexed")
        return Encoded(name, content)


class ShardImages(Sequence[Encoded]):
    """The images of some shards, one after the other, read on access."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = shards
        self.bounds = np.cumsum([0, *(len(shard.keys) for shard in shards)])  # shard k has images bounds[k]..[k + 1]

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, i: int) -> Encoded:  # type: ignore[override]  # no slices
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = int(np.searchsorted(self.bounds, i, side="right")) - 1
        return self.shards[number].read(i - int(self.bounds[number]))


def samples_of(shards: Sequence[Shard]) -> Samples:
    """The images of several shards, one after the other."""
    names = [f"{shard.path.name}:{key.decode()}" for shard in shards for key in shard.keys]
    return Samples(ShardImages(shards), np.concatenate([shard.labels for shard in shards]).tolist(), names)


# index ----------------------------------------------------------------------------------------------------------------


def read_index(path: Path) -> Shard:
    """The index of a shard: the stored one, if the shard's size and modification time have not changed."""
    path = path.resolve()
    stat = path.stat()
    stamp = np.array([INDEX_VERSION, stat.st_size, stat.st_mtime_ns])
    stored = cache_dir() / "shards" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.npz"
    # If the stored index cannot be read, it is made again.
    with (
        suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),
        np.load(stored, allow_pickle=False) as arrays,
    ):
        if np.array_equal(arrays["stamp"], stamp):
            return Shard(path, arrays["keys"], arrays["offsets"], arrays["sizes"], arrays["labels"])
    shard = make_index(path)
    with suppress(OSError):  # without a writable cache, indexing only takes time again
        _store(stored, stamp=stamp, keys=shard.keys, offsets=shard.offsets, sizes=shard.sizes, labels=shard.labels)
    return shard


def _store(path: Path, **arrays: NDArray[np.generic]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:  # by name, numpy would add a suffix
        np.savez(file, allow_pickle=False, **arrays)


def make_index(path: Path) -> Shard:
    """Reads the headers and labels of a tar file, and skips the images.

    Raises `InputError` if the file is not a whole tar file, and for an image without a label or the reverse.
    """
    with open(path, "rb") as file:
        members = _members(path, file)
        keys = sorted(
            (key for key, kinds in members.items() if kinds.keys() & {"image", "cls"}),
            key=lambda key: min(offset for offset, _ in members[key].values()),
        )
        labels = [_label(path, file, key, members[key]) for key in keys]
    places = np.array([members[key]["image"] for key in keys], np.int64).reshape(-1, 2)
    return Shard(
        path,
        np.array([key.encode(errors="backslashreplace") for key in keys], np.bytes_),
        places[:, 0],
        places[:, 1],
        np.array(labels, np.int64),
    )


def _members(path: Path, file: BinaryIO) -> dict[str, dict[str, tuple[int, int]]]:
    """Per key and kind ("image", "cls", "json"): (offset, size) in bytes."""
    members: dict[str, dict[str, tuple[int, int]]] = {}
    suffixes = image_suffixes()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                kind = "image" if f".{suffix.lower()}" in suffixes else suffix.lower()
                if member.size < 0:  # tarfile would read the same member without an end
                    raise tarfile.ReadError(f"{member.name} has a negative size")
                if not member.isreg() or member.issparse() or not key or kind not in ("image", "cls", "json"):
                    continue
                kinds = members.setdefault(f"{folder}/{key}" if folder else key, {})
                if kind in kinds:
                    raise InputError(
                        f"{path}: {member.name}: its key has two files of the kind {kind}; each key needs one"
                    )
                kinds[kind] = member.offset_data, member.size
            end = tar.offset
    except InputError:
        raise
    except Exception as error:  # damaged headers raise errors of many classes
        raise InputError(
            f"{path}: not a tar file that can be read ({error}); copy it again, or unpack it if it is compressed"
        ) from error
    # tarfile treats a damaged header, or a missing end mark, as the end of the file.
    tail = _read_at(file, end, 1 << 20)
    if len(tail) < tarfile.BLOCKSIZE or any(tail):
        raise InputError(f"{path}: truncated or damaged at byte {end:,}, where the archive should end; copy it again")
    return members


def _label(path: Path, file: BinaryIO, key: str, kinds: dict[str, tuple[int, int]]) -> int:
    if "image" not in kinds:
        raise InputError(f"{path}: {key} has a label, but no image (one of {' '.join(sorted(image_suffixes()))})")
    kind = "cls" if "cls" in kinds else "json"
    if kind not in kinds:
        raise InputError(
            f"{path}: {key} has no label: a file {key.rpartition('/')[2]}.cls with a number, or .json with a "
            '"label"; move tar files that are not shards out of this folder'
        )
    offset, size = kinds[kind]
    text = _read_at(file, offset, min(size, MAX_LABEL_BYTES))
    try:
        value = int(text) if kind == "cls" else json.loads(text)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        value = None
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > MAX_CLASSES:
        what = "the number of a class" if kind == "cls" else 'an object with a number "label"'
        raise InputError(f"{path}: {key}.{kind} should contain {what}; it contains {text[:40]!r}")
    return value


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
