"""Compares models in one process: first their outputs, then their times."""

import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from sret.bench.candidates import DTYPES, Dtype, Engine, Run, Source, Subject, make_subject, named, objection
from sret.bench.report import Report, Row
from sret.bench.timing import alternate, roofline
from sret.errors import InputError, first_line
from sret.export.runtime import Exported
from sret.layers.gpu_path import gpu_path
from sret.models.sret import SReT
from sret.ranges import PositiveInt, check_fields
from sret.version import device_name, versions

Wanted = Callable[[tuple[str, str, str]], bool]  # of model, engine, dtype

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.1}  # relative to the largest logit or loss


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a comparison: each model runs with each engine and data type, if it can."""

    batch_size: PositiveInt = 8
    img_size: tuple[int, int] | None = None  # height and width in pixels; None is each model's own size
    dtypes: tuple[Dtype, ...] = ("float32",)
    engines: tuple[Engine, ...] = ("eager",)
    is_training: bool = False  # training steps instead of inference
    device: Literal["cpu", "cuda"] | None = None  # None is a GPU if there is one
    rounds: PositiveInt = 20

    def __post_init__(self) -> None:
        check_fields(self)


def bench(
    models: Sequence[str] | Mapping[str, Source],
    settings: Settings | None = None,
    progress: Callable[[str], None] = lambda _: None,
    wanted: Wanted = lambda _: True,
) -> Report:
    """Compares models with the first one.

    Args:
        models: names of timm models with options, as in `sret_t:permutation=strided`, or files of weights or of
            `sret export`. A mapping can also have modules, and functions that return one.
        progress: receives a description of each step.
        wanted: whether to run (model, engine, dtype).

    Raises `InputError` for a model that cannot be made, and for outputs that differ.
    """
    settings = settings or Settings()
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    subjects = {}
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # float32 without TF32
    dynamo = torch._dynamo.config.patch(recompile_limit=64)  # each compiled model of a class counts
    with torch.random.fork_rng(range(torch.cuda.device_count())), exact, dynamo:
        for name, source in (models if isinstance(models, Mapping) else named(models)).items():
            progress(f"making {name}")
            subjects[name] = make_subject(name, source, settings.batch_size, settings.img_size, device)
        runs, left_out = _build(subjects, settings, progress, wanted)
        if not runs:
            raise InputError(f"nothing to compare: {'; '.join(left_out)}")
        progress("measuring matrix products")
        dtypes = dict.fromkeys(row.dtype for row in runs if row.dtype in DTYPES)
        peaks = {dtype: roofline(device, DTYPES[dtype]) for dtype in dtypes}
        progress(f"timing {len(runs)} candidates")
        rows = tuple(replace(row, seconds=tuple(times)) for row, times in alternate(runs, settings.rounds).items())
    packages = sorted({row.engine for row in rows} & {"onnxruntime", "openvino"})
    about = {
        **versions(),
        **{package: importlib.metadata.version(package) for package in ("timm", *packages)},
        "device": device_name(device.type),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "mode": "training" if settings.is_training else "inference",
        "batch_size": settings.batch_size,
        "rounds": settings.rounds,
        "peak_gflops": {dtype: round(peak / 1e9) for dtype, peak in peaks.items()},
        **({"gpu_paths": gpu_paths(subjects)} if device.type == "cuda" else {}),
    }
    return Report(about, rows, tuple(left_out))


def gpu_paths(subjects: Mapping[str, Subject]) -> dict[str, str]:
    """By model of sret: which kernels it uses on a GPU, and why."""
    return {name: gpu_path(subject.model) for name, subject in subjects.items() if isinstance(subject.model, SReT)}


def _build(
    subjects: Mapping[str, Subject], settings: Settings, progress: Callable[[str], None], wanted: Wanted
) -> tuple[dict[Row, Run], list[str]]:
    """What can run, with the difference of its output from eager float32, and what was left out and why."""
    runs: dict[Row, Run] = {}
    references: dict[str, Tensor] = {}
    left_out = []
    make = Subject.training if settings.is_training else Subject.predicting
    ways = {name: subject.ways(settings.engines, settings.dtypes) for name, subject in subjects.items()}
    keys = [(name, *way) for way in dict.fromkeys(chain(*ways.values())) for name in ways if way in ways[name]]
    for name, engine, dtype in filter(wanted, keys):
        subject, label, difference = subjects[name], f"{name} {engine} {dtype}", None
        progress(f"building {label}")
        try:
            if reason := objection(subject.model, engine, dtype, subject.images.device, settings.is_training):
                raise RuntimeError(reason)
            run = make(subject, engine, dtype)
            if not isinstance(subject.model, Exported):
                if name not in references:
                    references[name] = _outputs(make(subject, "eager", "float32"))
                reference, outputs = references[name], _outputs(run)
                difference = ((outputs - reference).abs().max() / reference.abs().max()).item()
        except (InputError, ModuleNotFoundError):
            raise
        except Exception as error:  # compilers and converters do not know every model
            left_out.append(f"{label}: {first_line(error)}")
            continue
        if difference is not None and not difference <= TOLERANCE[dtype]:  # also if it is NaN
            raise InputError(
                f"{label}: outputs or losses differ from eager float32 by {difference:.1e} of the largest value "
                f"({TOLERANCE[dtype]:.0e} allowed), so nothing was timed; training has to be without dropout"
            )
        runs[Row(name, engine, dtype, "x".join(map(str, subject.images.shape[2:])), subject.gmacs, difference)] = run
    return runs, left_out


def _outputs(run: Run) -> Tensor:
    """The outputs of two calls. In training, the loss of the second step shows the gradients of the first."""
    torch.manual_seed(0)  # of permutations in training
    return torch.stack([run().cpu().double() for _ in range(2)])
