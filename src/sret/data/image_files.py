"""Finds image files in a folder and its sub-folders, and warns of files of other kinds."""

import importlib.util
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import features

from sret.errors import InputWarning, plural, printable

# What Pillow decodes everywhere; AVIF and HEIF depend on what is installed.
_ALWAYS = set(".bmp .dib .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split())  # noqa: SIM905
_HEIF = (".heic", ".heif")
_SYSTEM_FOLDERS = {"@eadir", "__macosx", "$recycle.bin", "system volume information", "lost+found"}
_NOT_IMAGES = {".txt", ".csv", ".json", ".xml", ".md", ".yaml", ".yml", ".db", ".ini"}  # lists, labels, licences
_HINTS = {
    **dict.fromkeys(_HEIF, "pip install pillow-heif"),
    ".avif": "needs a Pillow with AVIF: pip install --upgrade pillow",
    **dict.fromkeys(
        (".cr2", ".cr3", ".nef", ".arw", ".dng", ".raw", ".svg", ".psd", ".mp4", ".mov"), "convert to .jpg or .png"
    ),
}


def image_suffixes() -> frozenset[str]:
    """The suffixes of files that this installation can decode, in lower case."""
    found = set(_ALWAYS)
    if features.check("avif"):
        found.add(".avif")
    if importlib.util.find_spec("pillow_heif"):
        found.update(_HEIF)
    return frozenset(found)


def decoding_hint(suffix: str) -> str:
    """How to read files with this suffix, in lower case; empty if this installation decodes them, or for others."""
    return "" if suffix in image_suffixes() else _HINTS.get(suffix, "")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out: its name starts with a dot, or is one that systems create."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def find_image_files(folder: Path, skipped: Counter[str] | None = None) -> list[Path]:
    """All image files below a folder, sorted; linked folders are followed, hidden files and folders are left out.

    Args:
        skipped: counts the skipped files by suffix; broken links are counted separately.
    """
    suffixes, found = image_suffixes(), []
    for path in _files(folder):
        suffix = path.suffix.lower()
        if suffix in suffixes and path.is_file():  # reading a pipe would block
            found.append(path)
        elif skipped is not None and suffix not in _NOT_IMAGES:
            skipped[(suffix or "without a suffix") if path.is_file() else "broken link or no regular file"] += 1
    return sorted(found)


def _files(folder: Path) -> Iterator[Path]:
    seen = set()  # folders; links may form a cycle
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        if os.path.realpath(root) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        yield from (Path(root, name) for name in files if not is_hidden(name))


def warn_of_skipped(folder: Path, skipped: Mapping[str, int]) -> None:
    """One warning with the kinds of files that were skipped, and how to make them readable."""
    if not skipped:
        return
    kinds = [
        f"{count} {printable(kind)}{f' ({_HINTS[kind]})' if kind in _HINTS else ''}"
        for kind, count in sorted(skipped.items(), key=lambda item: -item[1])
    ]
    total = sum(skipped.values())
    text = f"{folder}: {total} {plural('file', total)} skipped, not readable images: {', '.join(kinds[:6])}"
    warnings.warn(text, InputWarning, stacklevel=3)
