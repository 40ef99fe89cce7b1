"""Models side by side: how long they take, what they count and hold, after it is known that they answer alike.

All contenders are built and answer once before anything is timed (`contenders.py`), by engines that take equally many
threads (`engines.py`). Then they take turns (`measure.py`).
"""

import importlib.metadata
import json
import os
import pickle
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sret.bench.candidates import Key, Settings, Source, built_and_checked, named, ready, subject_of
from sret.bench.engines import CPU_ONLY, DTYPES, Run, Subject
from sret.bench.timing import (
    alternate,
    can_measure_memory,
    count_macs,
    peak_in_process,
    peak_on_cuda,
    ratio,
    roofline,
    spread,
    synchroniser,
)
from sret.errors import InputError
from sret.export.runtime import Exported
from sret.models.cost import model_cost
from sret.models.sret import SReT
from sret.version import versions

TRAINING_MACS = 3  # of one forward: backward takes about twice as many
RECOMPILATIONS = 64  # that compiled contenders of one class may need
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one contender.

    Attributes:
        is_ours: a model of sret.
        pixels: (height, width); macs: multiply-adds of one forward of one image.
        ms_per_image: median over the rounds; iqr_percent: interquartile range, of the median.
        vs_first: time over that of the first row, median over the rounds; vs_first_model: over that of the first model
            under the same engine and dtype, None if it has no such row.
        percent_of_roofline: FLOP/s over those of the fastest matrix product of the same dtype; None for int8.
        peak_mib: MiB taken for a while beyond weights (and an optimizer's state); None if not measured.
        difference: largest one from the eager float32 answer, over its largest number; None for an exported file.
        seconds: of each round, per batch.
    """

    model: str
    engine: str
    dtype: str
    is_ours: bool
    pixels: tuple[int, int]
    parameters: int
    macs: int
    ms_per_image: float
    iqr_percent: float
    images_per_s: float
    vs_first: float
    vs_first_model: float | None
    percent_of_roofline: float | None
    peak_mib: float | None
    difference: float | None
    seconds: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class Report:
    """Rows, what they depend on, and which contenders were left out and why."""

    about: dict[str, Any]
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]

    def to_json(self) -> str:
        """One line. The rounds' own times are left out."""
        rows = [{k: _rounded(v) for k, v in asdict(row).items() if k != "seconds"} for row in self.rows]
        return json.dumps({"benchmark": "bench", **self.about, "rows": rows, "left_out": self.left_out})


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def bench(
    models: Sequence[str] | Mapping[str, Source],
    settings: Settings | None = None,
    progress: Callable[[str], None] = lambda _: None,
    wanted: Callable[[Key], bool] = lambda _: True,
) -> Report:
    """Compares models; the first is the one that ratios refer to.

    Args:
        models: names of timm's models, ours among them, with options as in `sret_t:permutation=strided`; weights files
            of `sret`, or what it exported. Or any contenders under names of their own: each such a name or file, a
            module, or a function that makes one.
        progress: told what is being done, in a few words.
        wanted: of (model, engine, dtype), whether to measure it.

    Raises `InputError` for what cannot be compared, and for an engine whose answers differ.
    """
    settings = settings or Settings()
    device = settings.torch_device()
    sources = dict(models) if isinstance(models, Mapping) else named(models)
    if not sources:
        raise InputError("name at least one model")
    with _conditions(settings):
        subjects = {}
        for name, source in sources.items():
            progress(f"making {name}")
            subjects[name] = subject_of(name, source, settings, device)
        runs, differences, left_out = built_and_checked(subjects, settings, device, progress, wanted)
        if not runs:
            raise InputError(f"nothing is left to compare: {'; '.join(left_out)}")
        progress("counting multiply-adds")
        macs = {name: _macs(subject) for name, subject in subjects.items()}
        progress("measuring the fastest matrix product")
        dtypes = dict.fromkeys(dtype for _, _, dtype in runs if dtype in DTYPES)
        peaks = {dtype: roofline(device, DTYPES[dtype]) for dtype in dtypes}
        memory = {}
        for key, run in runs.items():
            progress(f"measuring memory: {' '.join(key)}")
            memory[key] = _peak_memory(key, run, sources, settings, device)
        progress(f"timing, {settings.rounds} rounds")
        names = {" ".join(key): key for key in runs}
        timed = alternate({name: runs[key] for name, key in names.items()}, settings.rounds, synchroniser(device))
        seconds = {names[name]: times for name, times in timed.items()}
        about = _about(settings, device, peaks, {engine for _, engine, _ in runs})

    first, first_model = next(iter(seconds)), next(iter(sources))
    rows = [
        _row(
            key,
            subjects[key[0]],
            settings,
            times,
            reference=seconds[first],
            same=seconds.get((first_model, *key[1:])),
            macs=macs[key[0]],
            peak_flops=peaks.get(key[2]),
            peak_bytes=memory[key],
            difference=differences.get(key),
        )
        for key, times in seconds.items()
    ]
    return Report(about, tuple(rows), tuple(left_out))


def _row(
    key: Key,
    subject: Subject,
    settings: Settings,
    seconds: Sequence[float],
    *,
    reference: Sequence[float],
    same: Sequence[float] | None,
    macs: int,
    peak_flops: float | None,
    peak_bytes: int | None,
    difference: float | None,
) -> Row:
    """One contender's row.

    Args:
        seconds: per batch, of each round; `reference` of the first contender; `same` of the first model under the same
            engine and dtype.
        macs: for one image.
        peak_flops: per second, of the fastest matrix product.
    """
    name, engine, dtype = key
    median = statistics.median(seconds)
    flops = 2 * macs * settings.batch_size * (TRAINING_MACS if settings.is_training else 1)
    return Row(
        model=name,
        engine=engine,
        dtype=dtype,
        is_ours=isinstance(subject.model, SReT | Exported),
        pixels=(subject.images.shape[2], subject.images.shape[3]),
        parameters=_parameters(subject.model),
        macs=macs,
        ms_per_image=1e3 * median / settings.batch_size,
        iqr_percent=100 * spread(seconds),
        images_per_s=settings.batch_size / median,
        vs_first=ratio(seconds, reference),
        vs_first_model=ratio(seconds, same) if same else None,
        percent_of_roofline=100 * flops / median / peak_flops if peak_flops else None,
        peak_mib=None if peak_bytes is None else peak_bytes / MIB,
        difference=difference,
        seconds=tuple(seconds),
    )


def _macs(subject: Subject) -> int:
    if isinstance(subject.model, Exported):
        return model_cost(subject.model.config).macs
    return count_macs(subject.model, subject.images[:1])


def _parameters(model: nn.Module) -> int:
    if isinstance(model, Exported):
        return model_cost(model.config).parameters
    return sum(p.numel() for p in model.parameters())


# conditions ----------------------------------------------------------------------------------------------------------


@contextmanager
def _conditions(settings: Settings) -> Iterator[None]:
    """The number of threads, and float32 products that are float32; afterwards all is as before."""
    from torch._dynamo import config as dynamo

    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        with dynamo.patch(recompile_limit=RECOMPILATIONS):
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
        torch.backends.cudnn.allow_tf32 = before[2]


def _about(settings: Settings, device: torch.device, peaks: Mapping[str, float], engines: set[str]) -> dict[str, Any]:
    used = ["timm", *(engine for engine in CPU_ONLY if engine in engines)]
    about = {
        **versions(),
        **{package: importlib.metadata.version(package) for package in used},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "batch_size": settings.batch_size,
        "mode": "training" if settings.is_training else "inference",
        "rounds": settings.rounds,
        "roofline_gflops": {dtype: _rounded(flops / 1e9) for dtype, flops in peaks.items()},
    }
    return {**about, "tf32": False} if device.type == "cuda" else about


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# memory --------------------------------------------------------------------------------------------------------------


def _peak_memory(
    key: Key, run: Run, sources: Mapping[str, Source], settings: Settings, device: torch.device
) -> int | None:
    """Bytes; None where it is not asked for, or cannot be told."""
    if device.type == "cuda":
        return peak_on_cuda(run, device)
    if not settings.memory or not can_measure_memory():
        return None
    name = key[0]
    try:
        source = pickle.dumps(sources[name])
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"{name}: memory is measured in a process of its own, and this model cannot be sent there ({error}); give "
            "a function at the top of a module that makes it"
        ) from error
    alone = replace(settings, threads=torch.get_num_threads())
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(_peak_alone, key, source, alone).result()
    except BrokenProcessPool:
        raise InputError(f"{' '.join(key)}: the process that measured its memory was killed; memory short?") from None


def _peak_alone(key: Key, source: bytes, settings: Settings) -> int:
    """In a fresh process: bytes that one contender takes to answer."""
    name, engine, dtype = key
    with _conditions(settings):
        subject = subject_of(name, pickle.loads(source), settings, torch.device("cpu"))
        run = ready(subject, engine, dtype, settings)
        if engine not in CPU_ONLY:  # these keep what their first call takes
            run()
            run()
        return peak_in_process(run)
