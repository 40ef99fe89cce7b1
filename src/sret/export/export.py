"""Models into files that answer without PyTorch: ONNX for ONNX Runtime, OpenVINO's format for OpenVINO.

    fuse -> torch.export -> ONNX, each weight once -> for int8: calibrated on images -> for OpenVINO: converted

Both engines thus run one graph. A file is read back and its answers compared with the model's before it gets its name.

int8 is for the products with weights, which are rounded per channel, their inputs per tensor; the rest stays in
float32. With int8 convolutions too, the largest error on the digits was twice as large; int8 products inside attention
only cost time. NNCF, OpenVINO's own calibration, also corrects biases, layer by layer; here, where passes share them,
that made its errors five times as large as without.
"""

import copy
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sret.checkpoints.card import Card
from sret.checkpoints.resolve import resolve
from sret.data.dataset import ImageDataset, Samples, Unreadable
from sret.data.sources import load_data
from sret.errors import InputError
from sret.export.runtime import DTYPES, ENGINES, NAMESPACE, Exported, Stamp, import_openvino, last_line, load_exported
from sret.files import sha256_of
from sret.models.fuse import fuse
from sret.models.sret import SReT
from sret.version import __version__

OPSET = 20  # the first with GELU
TOLERANCE = 1e-4  # of the logits of a float32 file, relative to the largest logit
FIRST_BATCHES = (1, 3)  # a graph in which the batch size became fixed fails at one of them
RANDOM_IMAGES = 16  # to compare on without data
MOST_BYTES = 2**31 - 2**24  # of weights, in an ONNX file; the rest is for the graph
NO_LIMIT = 2**62  # bytes
# What our graphs have a use for of onnxscript's rules; its first versions lack the last.
REWRITES = ("mul_by_1_rule", "squeeze_reshape_1d_rule", "materialize_reshape_shape_rule")

Batch = tuple[Tensor, Sequence[int] | None]  # (B, C, H, W) and labels


@dataclass(frozen=True)
class Comparison:
    """How a file answers beside the model that it was made from.

    Attributes:
        count: images.
        difference: largest absolute difference between two logits.
        scale: largest absolute logit of the model.
        agreement: share of images with the same top-1, in percent; None without classes.
        top1: (the model's, the file's) accuracy in percent; None without labels.
    """

    count: int
    difference: float
    scale: float
    agreement: float | None
    top1: tuple[float, float] | None


@dataclass(frozen=True)
class Export:
    """What was written; as text, the lines that a user sees.

    Attributes:
        size: bytes, of both files for OpenVINO.
        images: what kind of images the comparison is over.
    """

    path: Path
    size: int
    engine: str
    dtype: str
    comparison: Comparison
    images: str

    def __str__(self) -> str:
        found = self.comparison
        images = f"{found.count} {self.images}"
        same = "" if found.agreement is None else f"; the same top-1 for {found.agreement:.2f} %"
        lines = [
            f"{self.path}: {self.size / 2**20:.1f} MiB, {self.dtype} for {self.engine}",
            f"parity on {images}: logits differ by at most {found.difference:.1e}, the largest is "
            f"{found.scale:.3g}{same}",
        ]
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
) -> Export:
    """`export_model` for what `resolve` takes: a weights file, ours or the authors', or a published name."""
    _check(out, dtype, data)
    model, card = resolve(source)
    return export_model(model, card, out, dtype, img_size, data, samples, batch_size)


def export_model(
    model: SReT,
    card: Card,
    out: Path,
    dtype: str = "float32",
    img_size: int | tuple[int, int] | None = None,
    data: str | None = None,
    samples: int = 300,
    batch_size: int = 16,
) -> Export:
    """Writes a model for another engine, once its answers from there agree with the model's.

    Args:
        card: goes into the file, which is then enough to predict with.
        out: a new file: `.onnx` for ONNX Runtime, or `.xml` (with a `.bin` beside it) for OpenVINO.
        dtype: "float32"; "bfloat16", for OpenVINO; "int8", for which `data` is needed.
        img_size: pixels, one number or (height, width): the only size that the file takes. By default the card's.
        data: images to compare on, as `load_data` takes them; without it random ones, which say nothing of accuracy.
        samples: at most so many of the held-out ones (test, or else val); int8 is calibrated on as many for training.
        batch_size: images at a time meanwhile; the file takes any number.

    Raises `InputError` for what cannot be, and for logits that differ by more than `TOLERANCE` in float32, or are not
    finite. Then nothing is left.
    """
    _check(out, dtype, data)
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    if sum(tensor.nbytes for tensor in model.state_dict().values()) > MOST_BYTES:
        raise InputError(f"{out}: weights of more than 2 GiB do not fit into an ONNX file; take a smaller model")
    size = (img_size, img_size) if isinstance(img_size, int) else img_size or card.preprocessing.img_size
    card = replace(
        card,
        config=replace(model.config, img_size=size),
        preprocessing=replace(card.preprocessing, img_size=size),
    )
    calibration: Iterator[Batch] = iter(())
    if data is None:
        batches, images = _random_batches(card), "random images"
    else:
        found = load_data(data)
        card.check_classes(found.name, found.class_names)
        split = "test" if "test" in found.splits else "val"
        batches = _batches(_some(found.split(split), samples), card, chain(FIRST_BATCHES, repeat(batch_size)))
        images = f"images of {found.name}, {split}"
        if dtype == "int8":
            calibration = _batches(_some(found.split("train"), samples), card, repeat(batch_size))
    with _aside(out) as folder:
        path = folder / out.name
        with _quiet():
            proto = to_onnx(model, card.config.input_size)
            if dtype == "int8":
                proto = _quantized(proto, calibration, folder)
            stamp = Stamp(card.to_json(), dtype, __version__)
            (_write_onnx if out.suffix == ".onnx" else _write_openvino)(proto, stamp, path)
        comparison = compare(model, load_exported(path)[0], batches)
        _check_parity(comparison, out, dtype)
        _publish(folder, out)
    size_on_disk = sum(file.stat().st_size for file in _files(out))
    return Export(out, size_on_disk, ENGINES[out.suffix], dtype, comparison, images)


def compare(model: SReT, exported: Exported, batches: Iterable[Batch]) -> Comparison:
    """How both answer for the same images, with accuracies if all batches have labels."""
    expected, answered = [], []
    labels: list[int] | None = []
    for images, some_labels in batches:
        with torch.no_grad():
            expected.append(model(images))
        answered.append(exported(images))
        labels = None if labels is None or some_labels is None else [*labels, *some_labels]
    before, after = torch.cat(expected), torch.cat(answered)
    agreement, top1 = None, None
    if exported.num_classes:
        agreement = _percent(before.argmax(1) == after.argmax(1))
        if labels is not None:
            truth = torch.tensor(labels)
            top1 = _percent(before.argmax(1) == truth), _percent(after.argmax(1) == truth)
    difference, scale = (before - after).abs().max().item(), before.abs().max().item()
    return Comparison(len(before), difference, scale, agreement, top1)


def to_onnx(model: SReT, img_size: tuple[int, int]) -> Any:
    """The fused model as an `onnx.ModelProto`: "images" (batch, C, *img_size) -> "logits" (batch, num_classes)."""
    import onnx_ir
    import onnxscript.optimizer  # noqa: F401 (if it is missing, that is said here, before torch says it in its words)

    fused = fuse(model)
    images = torch.zeros(2, fused.in_chans, *img_size)
    with torch.no_grad():
        fused(images)  # the permutations are known now, and become constants
        program = torch.export.export(fused, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        onnx_program = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert onnx_program is not None
    graph = onnx_program.model
    _simplify(graph)
    return onnx_ir.to_proto(graph)


def _simplify(graph: Any) -> None:
    """What depends on weights alone is computed, once for all passes, in a time that grows with their number.

    That of `onnxscript.optimizer.optimize`, which does the same, grows with its square: one of its rules, for slices
    that make up a split, compares all pairs of nodes.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    known = [getattr(rules, name) for name in REWRITES if hasattr(rules, name)]
    rewrite = rewriter.RewritePass(rewriter.RewriteRuleSet(known, commute=True))
    limits = {"input_size_limit": NO_LIMIT, "output_size_limit": NO_LIMIT}
    common.CommonSubexpressionEliminationPass()(graph)  # before weights are transposed, once for each pass
    for _ in range(2):  # rules find more where constants are folded, and the other way round
        optimizer.fold_constants(graph, onnx_shape_inference=True, **limits)
        rewrite(graph)
        common.RemoveUnusedNodesPass()(graph)
    common.RemoveUnusedOpsetsPass()(graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    common.DeduplicateInitializersPass()(graph)
    common.CommonSubexpressionEliminationPass()(graph)
    common.ClearMetadataAndDocStringPass()(graph)


# writing -------------------------------------------------------------------------------------------------------------


class _Feed:
    """Batches as ONNX Runtime's calibration asks for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch[0].numpy()}


def _quantized(proto: Any, calibration: Iterator[Batch], folder: Path) -> Any:
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    weights = {tensor.name for tensor in proto.graph.initializer}
    products = [n.name for n in proto.graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in weights]
    path = folder / "quantized.onnx"
    quantize_static(
        proto,
        str(path),
        _Feed(calibration),
        quant_format=QuantFormat.QDQ,
        nodes_to_quantize=products,
        per_channel=True,
        # Signed on both sides: with unsigned inputs, processors without VNNI add up in 16 bits, which overflow.
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibration_providers=["CPUExecutionProvider"],
    )
    return onnx.load(str(path))


def _write_onnx(proto: Any, stamp: Stamp, path: Path) -> None:
    for name, text in asdict(stamp).items():
        proto.metadata_props.add(key=f"{NAMESPACE}.{name}", value=text)
    path.write_bytes(proto.SerializeToString())


def _write_openvino(proto: Any, stamp: Stamp, path: Path) -> None:
    openvino = import_openvino()
    model = openvino.Core().read_model(proto.SerializeToString())
    try:
        openvino.save_model(model, path, compress_to_fp16=stamp.dtype == "bfloat16")  # it has no bfloat16 weights
        for name, text in asdict(replace(stamp, weights=sha256_of(path.with_suffix(".bin")))).items():
            model.set_rt_info(text, [NAMESPACE, name])
        openvino.save_model(model, path, compress_to_fp16=stamp.dtype == "bfloat16")
    except RuntimeError as error:
        raise InputError(f"{path}: OpenVINO could not write it ({last_line(error)})") from error


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that goes away, whatever happens."""
    folder = out.with_name(f".{out.name}.tmp")  # one name, so that what a killed process left is cleared
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters log what is of no use to a user."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _publish(folder: Path, out: Path) -> None:
    """Gives what was written its name: all files, or none."""
    published: list[Path] = []
    try:
        for path in _files(out):
            with (folder / path.name).open("rb") as file:
                os.fsync(file.fileno())
            (folder / path.name).replace(path)
            published.append(path)
    except OSError:
        for path in published:
            path.unlink()
        raise


def _files(out: Path) -> list[Path]:
    return [out] if out.suffix == ".onnx" else [out.with_suffix(".bin"), out]


# checks and images -------------------------------------------------------------------------------------------------


def _check(out: Path, dtype: str, data: str | None) -> None:
    """Raises `InputError` for what can be seen to be wrong before any work."""
    if out.suffix not in ENGINES:
        raise InputError(f"{out}: OUT ends in .onnx (for ONNX Runtime) or .xml (for OpenVINO)")
    for file in _files(out):
        if file.exists():
            raise InputError(f"{file} exists already; remove it, or name another file")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if dtype == "bfloat16" and out.suffix == ".onnx":
        raise InputError(
            f"{out}: ONNX Runtime has no bfloat16 on CPUs; name an OUT.xml for OpenVINO, or take another dtype"
        )
    if dtype == "int8" and data is None:
        raise InputError("int8 is calibrated on real images; name some with --data, best those of training")


def _check_parity(comparison: Comparison, out: Path, dtype: str) -> None:
    difference, scale = comparison.difference, comparison.scale
    if not np.isfinite(difference):
        raise InputError(f"{out}: in {dtype} its answers are not finite, so it was not written; try float32")
    if dtype == "float32" and difference > TOLERANCE * scale:
        raise InputError(
            f"{out}: its logits differ from the model's by up to {difference:.1e} where the largest is {scale:.3g}, by "
            f"more than {TOLERANCE:.0e} of it, so it was not written; try another engine, or another version of this"
        )


def _some(samples: Samples, most: int) -> Samples:
    """A random choice, the same every time: a folder has its images class by class."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(samples))
    return samples.take(sorted(order[:most].tolist()))


def _batches(samples: Samples, card: Card, sizes: Iterable[int]) -> Iterator[Batch]:
    dataset, unreadable, start = ImageDataset(samples, card.preprocessing), Unreadable(0), 0
    for size in sizes:
        if start >= len(dataset):
            return
        items = [dataset[i] for i in range(start, min(start + size, len(dataset)))]
        unreadable.note(problem for _, _, problem in items)
        yield (
            card.preprocessing.normalize(torch.stack([image for image, _, _ in items])),
            [label for _, label, _ in items],
        )
        start += size


def _random_batches(card: Card) -> Iterator[Batch]:
    config, generator = card.config, torch.Generator().manual_seed(0)
    images = torch.randn(RANDOM_IMAGES, config.in_chans, *config.input_size, generator=generator)
    for part in images.split([*FIRST_BATCHES, RANDOM_IMAGES - sum(FIRST_BATCHES)]):
        yield part, None


def _percent(flags: Tensor) -> float:
    return 100 * flags.double().mean().item()
