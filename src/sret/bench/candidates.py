"""Makes models by name, file or module, and runs them with an engine and a data type: inference or training steps.

    eager        the module as it is
    fused        for models of sret: `sret.fuse`, then as eager
    compile      torch.compile with frozen weights, after `sret.fuse`; in training `SReT.compile` for models of sret
    cudagraphs   compile with CUDA graphs
    onnxruntime  ONNX Runtime on the CPU, with what `sret export` writes or, for other models, torch.onnx
    openvino     the same with OpenVINO

A file written by `sret export` runs only with its own engine. All engines use as many threads as PyTorch. A model made
by name has random weights.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sret.errors import InputError, did_you_mean, first_line
from sret.export.onnx import to_onnx
from sret.export.runtime import ENGINES as EXPORTED
from sret.export.runtime import Exported, load_model, run_onnx
from sret.models.build import count_macs, totals_of
from sret.models.fuse import fuse
from sret.models.sret import SReT
from sret.safe_yaml import read_yaml

Source = str | nn.Module | Callable[[], nn.Module]
Run = Callable[[], Tensor]
Engine = Literal["eager", "fused", "compile", "cudagraphs", "onnxruntime", "openvino"]
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Subject:
    """A classifier in float32, and a batch of images (B, C, H, W) on its device."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model.eval(), images
        macs = totals_of(model.config)[1] if isinstance(model, Exported) else count_macs(model, images[:1])
        self.gmacs = macs / 1e9

    def ways(self, engines: Iterable[str], dtypes: Iterable[str]) -> list[tuple[str, str]]:
        """The engines and data types to run it with."""
        if isinstance(self.model, Exported):
            return [(self.model.engine.replace(" ", "").lower(), self.model.dtype)]
        return [(engine, dtype) for engine in engines for dtype in dtypes]

    @cached_property
    def onnx(self) -> bytes:
        """The model in ONNX; a model of other libraries for this batch size only."""
        import onnxscript  # noqa: F401  (torch's own error about a missing onnxscript is long)

        if isinstance(self.model, SReT):
            channels, height, width = self.images.shape[1:]
            return to_onnx(self.model, (channels, height, width)).SerializeToString()
        program = torch.onnx.export(self.model, (self.images,), dynamo=True, verbose=False)
        assert program is not None
        return program.model_proto.SerializeToString()

    def predicting(self, engine: str, dtype: str) -> Run:
        """A callable that returns logits (B, K). Its first call may compile."""
        if isinstance(self.model, Exported):
            return lambda: self.model(self.images)
        if engine in ("onnxruntime", "openvino"):
            infer = run_onnx(self.onnx, engine, dtype)
            return lambda: torch.from_numpy(infer(self.images.numpy()))
        images = self.images.to(DTYPES[dtype])
        model = fuse(self.model) if isinstance(self.model, SReT) and engine != "eager" else self.model
        model = copy.deepcopy(model).to(DTYPES[dtype]) if dtype != "float32" else model
        forward: Callable[[Tensor], Tensor] = model
        if engine in ("compile", "cudagraphs"):
            with torch.no_grad():
                model(images[:1])  # stores its permutations: a graph must not create them
            # Not dynamic: otherwise the second model of a class gets slower kernels, which fit any shape.
            options: dict[str, Any] = {"freezing": True, "triton.cudagraphs": engine == "cudagraphs"}
            forward = torch.compile(model, dynamic=False, options=options)

        @torch.no_grad()
        def run() -> Tensor:
            if engine == "cudagraphs":
                torch.compiler.cudagraph_mark_step_begin()
            return forward(images)

        return run

    def training(self, engine: str, dtype: str) -> Run:
        """A callable that makes a step (forward, cross-entropy, backward, AdamW) and returns the loss before it."""
        model, images = copy.deepcopy(self.model).train(), self.images
        labels = torch.zeros(len(images), dtype=torch.long, device=images.device)  # every model has a class 0
        # The learning rate is small because all steps have the same images.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if engine == "compile":
            model.compile(dynamic=None if isinstance(model, SReT) else False)

        def run() -> Tensor:
            with torch.autocast(images.device.type, DTYPES[dtype], enabled=dtype != "float32"):
                loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return run


def objection(model: nn.Module, engine: str, dtype: str, device: torch.device, is_training: bool) -> str:
    """Why a model cannot run with this engine and data type; an empty string if it can."""
    on_cuda = device.type == "cuda"
    reasons = {
        "training needs eager or compile": is_training and engine not in ("eager", "compile"),
        "it has no weights that can be trained": is_training and not any(p.requires_grad for p in model.parameters()),
        "training in float16 needs loss scaling; use bfloat16": is_training and dtype == "float16",
        "only models of sret can be fused": engine == "fused" and not isinstance(model, SReT),
        "runs on the CPU; use --device cpu": on_cuda and engine in ("onnxruntime", "openvino"),
        "needs --device cuda": not on_cuda and engine == "cudagraphs",
        "float16 needs --device cuda; on a CPU use bfloat16": not on_cuda and dtype == "float16",
        "ONNX Runtime has no bfloat16 on a CPU": engine == "onnxruntime" and dtype == "bfloat16",
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def named(names: Sequence[str]) -> dict[str, Source]:
    """Models by their names. A name given twice becomes two models, which shows the noise."""
    earlier = [names[:i].count(name) for i, name in enumerate(names)]
    return {f"{name} ({n + 1})" if n else name: name for name, n in zip(names, earlier, strict=True)}


def make_subject(
    name: str, source: Source, batch_size: int, size: tuple[int, int] | None, device: torch.device
) -> Subject:
    """A model and a batch of random images, of the model's own size by default. Raises `InputError` if it fails."""
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    if not isinstance(source, str):
        model = source if isinstance(source, nn.Module) else source()
    else:
        source, passes = _without_passes(source)
        if Path(source.partition(":")[0]).is_file() and ":" in source:
            raise InputError(f"{name}: the only option of a file is passes, as in FILE:passes=2")
        if Path(source).suffix in (".safetensors", *EXPORTED) or Path(source).is_file():
            model = load_model(source, passes)[0]
        else:
            model, options = _from_timm(source, size)
            if passes is not None:
                if not isinstance(model, SReT):
                    raise InputError(f"{name}: only models of sret have passes")
                model.set_passes(passes)
    channels, *own_size = _image_shape(model, options)
    shape = (channels, *(size or own_size))
    try:
        subject = Subject(model.to(device), torch.randn(batch_size, *shape).to(device))
        with torch.no_grad():
            logits = model(subject.images[:1])
    except Exception as error:  # models of other libraries raise whatever they like
        raise InputError(f"{name} with images of shape {shape}: {first_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise InputError(f"{name} does not return logits (batch, classes), so it cannot be compared")
    return subject


def _without_passes(name: str) -> tuple[str, int | list[int] | None]:
    """The name of a model without its option `passes=k` or `passes=[k,l,...]`, and the value; None without it."""
    if (given := re.search(r"(?<=[:,])passes=", name)) is None:
        return name, None
    match = re.match(r"passes=(\d+|\[\d+(?:, *\d+)*\])(?:,|$)", name[given.start() :])
    if match is None:
        raise InputError(f"{name}: write passes=2, or a number for each stage, passes=[2,2,1]")
    numbers = [int(digits) for digits in re.findall(r"\d+", match[1])]
    rest = name[: given.start()] + name[given.start() + match.end() :]
    return rest.rstrip(":,"), numbers if match[1].startswith("[") else numbers[0]


def _from_timm(name: str, size: tuple[int, int] | None) -> tuple[nn.Module, dict[str, Any]]:
    """A model of timm and its options, which follow a colon: `sret_t:permutation=strided,img_size=64`."""
    variant, _, text = name.partition(":")
    known = timm.list_models()
    if variant.partition(".")[0] not in known:
        raise InputError(f"no model {variant!r}: give a model of timm or a weights file{did_you_mean(variant, known)}")
    pairs = [option.partition("=") for option in text.split(",") if option]
    if not all(equals for _, equals, _ in pairs):
        raise InputError(f"{name}: write options as {variant}:name=value,name=value")
    options = {key: read_yaml(value) for key, _, value in pairs}
    if "img_size" in options and size:
        raise InputError(f"{name}: give img_size or --img-size, not both")
    try:
        try:
            model = timm.create_model(variant, **(options | {"img_size": size} if size else options))
        except TypeError as error:  # convolutional networks take images of any size, and no img_size
            if not size or "img_size" not in str(error):
                raise
            model = timm.create_model(variant, **options)
    except Exception as error:  # timm passes on what a constructor raises
        raise InputError(f"{name}: {first_line(error)}") from error
    with torch.no_grad():
        for p in model.parameters():  # initial zeros and tiny scales would hide errors of an engine
            if p.numel() and (p == p.flatten()[0]).all():
                p.add_(torch.randn_like(p), alpha=0.1 if p.ndim < 2 else 0.02)
    return model, options


def _image_shape(model: nn.Module, options: Mapping[str, Any]) -> tuple[int, ...]:
    """(channels, height, width) of the images of a model that was made with these options."""
    if isinstance(model, SReT | Exported):
        return model.config.in_chans, *model.config.input_size
    channels, *size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    size = options.get("img_size", size)
    return options.get("in_chans", channels), *([size, size] if isinstance(size, int) else size)
