"""Exports models to files for ONNX Runtime and OpenVINO, which run them without PyTorch.

Both engines run the same graph. Before a file gets its name, its engine loads it and its outputs are compared with
those of the model.
"""

import copy
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from sret.checkpoints.adapt import with_passes
from sret.checkpoints.card import Card
from sret.checkpoints.files import ENGINES
from sret.checkpoints.resolve import resolve
from sret.data.loading import Unreadable
from sret.data.sources import load_data
from sret.elastic import EarlyExit, ExitPolicy
from sret.errors import InputError, numbers_to
from sret.export.exits import exit_policy, with_exits
from sret.export.onnx import to_onnx, write_onnx
from sret.export.openvino import write_openvino
from sret.export.quantize import quantized
from sret.export.runtime import DTYPES, ExportMetadata, load_exported
from sret.export.verify import (
    FIRST_BATCHES,
    Batch,
    Comparison,
    batches_of,
    check_parity,
    compare,
    random_batches,
    random_subset,
)
from sret.files import TEMPORARY, format_bytes
from sret.models.sret import SReT
from sret.ranges import NonNegativeInt, PositiveInt, check_number
from sret.version import __version__

MAX_WEIGHT_BYTES = 2**31 - 2**24  # ONNX files have at most 2 GiB; the rest is for the graph


@dataclass(frozen=True)
class Export:
    """The result of an export; `str` gives the lines that a user sees.

    Attributes:
        size: bytes, for OpenVINO of both files.
        images: the kind of images in the comparison.
        exits: of a file with early exit, how many of these images left at each exit.
    """

    path: Path
    size: int
    engine: str
    dtype: str
    comparison: Comparison
    images: str
    exits: tuple[int, ...] = ()

    def __str__(self) -> str:
        found = self.comparison
        images = f"{found.count} {self.images}"
        same = "" if found.agreement is None else f"; the same top-1 for {found.agreement:.2f} %"
        lines = [
            f"{self.path}: {format_bytes(self.size)}, {self.dtype} for {self.engine}",
            f"parity on {images}: logits differ by at most {found.difference:.1e}, the largest is "
            f"{found.scale:.3g}{same}",
        ]
        if self.exits:
            lines.append(
                f"early exit: images that left at exit {numbers_to(len(self.exits))}: {' '.join(map(str, self.exits))}"
            )
        if found.top1 is not None:
            before, after = found.top1
            lines.append(
                f"accuracy on {images}: PyTorch float32 {before:.2f} %, {self.engine} {self.dtype} {after:.2f} % "
                f"({after - before:+.2f})"
            )
        return "\n".join(lines)


def export(
    source: str,
    out: Path,
    dtype: str = "float32",
    img_size: int | tuple[int, int] | None = None,
    data: str | None = None,
    samples: int = 300,
    batch_size: int = 16,
    max_corrupt: int = 0,
    passes: int | Sequence[int] | None = None,
    exit: float | Literal["auto"] | None = None,
) -> Export:
    """`export_model` for what `resolve` takes: a weights file of sret or of the authors, or a published name.

    Args:
        passes: as in `with_passes`.
        exit: threshold of early exit, as in `exit_policy`.
    """
    _check(out, dtype, data, exit is not None)
    model, card = with_passes(*resolve(source), passes)
    policy = exit_policy(model, card, source, exit)
    return export_model(model, card, out, dtype, img_size, data, samples, batch_size, max_corrupt, policy)


def export_model(
    model: nn.Module,
    card: Card,
    out: Path,
    dtype: str = "float32",
    img_size: int | tuple[int, int] | None = None,
    data: str | None = None,
    samples: int = 300,
    batch_size: int = 16,
    max_corrupt: int = 0,
    policy: ExitPolicy | None = None,
) -> Export:
    """Writes a model as a file for another engine, if its outputs there agree with the model's.

    Args:
        card: stored in the file, which is then sufficient for prediction.
        out: a new file: `.onnx` for ONNX Runtime, or `.xml` (with a `.bin` file beside it) for OpenVINO.
        dtype: "float32"; "bfloat16", only for OpenVINO; "int8", which needs `data`.
        img_size: pixels, one number or (height, width): the only size that the file takes. By default the card's.
        data: a data set for the comparison, as `load_data` takes it. By default random images, which give no accuracy.
        samples: at most this many test images (or validation images) for the comparison, and training images for the
            calibration of int8.
        batch_size: images per batch in the comparison; the file takes batches of any size.
        max_corrupt: number of unreadable images that may be skipped.
        policy: when images leave early; by default the file has only the last exit.

    Raises `InputError` for a wrong option, and for outputs that `check_parity` refuses. Then no file is left.
    """
    _check(out, dtype, data, policy is not None)
    check_number("samples", samples, PositiveInt)
    check_number("batch_size", batch_size, PositiveInt)
    check_number("max_corrupt", max_corrupt, NonNegativeInt)
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    if sum(tensor.nbytes for tensor in model.state_dict().values()) > MAX_WEIGHT_BYTES:
        raise InputError(f"{out}: the weights have more than 2 GiB, the limit of an ONNX file; export a smaller model")
    size = (img_size, img_size) if isinstance(img_size, int) else img_size or card.preprocessing.img_size
    config = model.config.first_passes(model.passes) if isinstance(model, SReT) else card.config
    card = replace(
        card,
        config=replace(config, img_size=size),
        preprocessing=replace(card.preprocessing, img_size=size),
        exit_policy=policy,
    )
    batches, calibration, images = _images(card, dtype, data, samples, batch_size, max_corrupt)
    with _temporary_folder(out) as folder:
        path = folder / out.name
        with _quiet():
            proto = to_onnx(model, (card.config.in_chans, *card.config.input_size), policy)
            if dtype == "int8":
                proto = quantized(proto, calibration, folder)
            metadata = ExportMetadata(card.to_json(), dtype, __version__)
            (write_onnx if out.suffix == ".onnx" else write_openvino)(proto, metadata, path)
        reference = model if policy is None else EarlyExit(with_exits(model, out), policy)
        comparison = compare(reference, load_exported(path)[0], batches)
        check_parity(comparison, out, dtype)
        _publish(folder, out)
    size_on_disk = sum(file.stat().st_size for file in _files(out))
    exits = tuple(reference.counts.tolist()) if isinstance(reference, EarlyExit) else ()
    return Export(out, size_on_disk, ENGINES[out.suffix], dtype, comparison, images, exits)


def _images(
    card: Card, dtype: str, data: str | None, samples: int, batch_size: int, max_corrupt: int
) -> tuple[Iterator[Batch], Iterator[Batch], str]:
    """Batches for the comparison, batches for the calibration, and a description of the former."""
    if data is None:
        return random_batches(card), iter(()), "random images"
    found = load_data(data)
    card.check_classes(found.name, found.class_names)
    split = "test" if "test" in found.splits else "val"
    unreadable, sizes = Unreadable(max_corrupt), chain(FIRST_BATCHES, repeat(batch_size))
    batches = batches_of(random_subset(found.split(split), samples), card, sizes, unreadable)
    calibration: Iterator[Batch] = iter(())
    if dtype == "int8":
        calibration = batches_of(random_subset(found.split("train"), samples), card, repeat(batch_size), unreadable)
    return batches, calibration, f"images of {found.name}, {split}"


@contextmanager
def _temporary_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, which is deleted afterwards, also after an error."""
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}{TEMPORARY}")  # no other process writes to it
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Disables the log messages of the exporters, which do not help a user."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _publish(folder: Path, out: Path) -> None:
    """Renames the temporary files to their names: all of them, or none.

    Raises `InputError` if a file of such a name was written meanwhile, which stays.
    """
    claimed: list[Path] = []
    try:
        for path in _files(out):
            with (folder / path.name).open("rb") as file:
                os.fsync(file.fileno())
            path.touch(exist_ok=False)
            claimed.append(path)
        for path in claimed:
            (folder / path.name).replace(path)
    except BaseException as error:
        for own in claimed:
            own.unlink()
        if isinstance(error, FileExistsError):
            raise InputError(f"{path} was written by another process meanwhile; choose another name") from error
        raise


def _files(out: Path) -> list[Path]:
    return [out] if out.suffix == ".onnx" else [out.with_suffix(".bin"), out]


def _check(out: Path, dtype: str, data: str | None, exits_early: bool) -> None:
    """Raises `InputError` for wrong options, before any work."""
    if out.suffix not in ENGINES:
        raise InputError(f"{out}: OUT ends in .onnx (for ONNX Runtime) or .xml (for OpenVINO)")
    for file in _files(out):
        if file.exists():
            raise InputError(f"{file} already exists; delete it, or choose another name")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if dtype == "bfloat16" and out.suffix == ".onnx":
        raise InputError(f"{out}: ONNX Runtime has no bfloat16 on CPUs; give OUT.xml for OpenVINO, or another dtype")
    if dtype == "int8" and exits_early:
        raise InputError(
            "int8 cannot be used with early exit; use float32, or bfloat16 for OpenVINO, or leave out --exit"
        )
    if dtype == "int8" and data is None:
        raise InputError("int8 needs real images for its calibration; give --data, best the training data")
