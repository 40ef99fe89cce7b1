"""Measures the numbers of docs/performance.md: inference, slicing and training, each in one process.

    python benchmarks/performance.py inference [--batch-size 16] [--models t|s]
    python benchmarks/performance.py slicing   [--engines fused,openvino]
    python benchmarks/performance.py training  [--batch-size 16]

`naive` is the authors' arithmetic with the same weights (naive.py). Weights are random, which does not change the time.
The last line of the output is JSON with the same data; performance_figure.py draws it. OMP_NUM_THREADS sets the number
of threads.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace

import timm
import torch
from memory import peak_mib
from naive import Naive
from torch import nn

import sret
from sret.bench.candidates import Source
from sret.bench.report import Report
from sret.bench.runner import Settings, bench
from sret.bench.timing import ratio

Key = tuple[str, str, str]  # model, engine, dtype


def naive_t() -> nn.Module:
    return Naive(_sret("sret_t"))


def naive_s() -> nn.Module:
    return Naive(_sret("sret_s"))


def _sret(name: str) -> sret.SReT:
    model = timm.create_model(name)
    assert isinstance(model, sret.SReT)
    return model


# Times are divided by those of the first model with the same engine. The second model is ours.
MODELS: dict[str, dict[str, Source]] = {
    "t": {
        "deit_tiny": "deit_tiny_patch16_224",
        "sret_t": "sret_t",
        "naive": naive_t,
        "pit_ti": "pit_ti_224",
    },
    "s": {
        "deit_small": "deit_small_patch16_224",
        "sret_s": "sret_s",
        "naive": naive_s,
        "swin_tiny": "swin_tiny_patch4_window7_224",
    },
}


def inference(options: argparse.Namespace) -> None:
    """All engines and data types; the naive formulation only in eager float32."""
    settings = settings_of(options, "eager,fused,compile,onnxruntime,openvino")
    against_others(MODELS[options.models], settings, options)


def training(options: argparse.Namespace) -> None:
    models = MODELS[options.models]
    settings = settings_of(options, "eager,compile", is_training=True)
    against_others({name: models[name] for name in list(models)[:3]}, settings, options)


def settings_of(options: argparse.Namespace, engines: str, is_training: bool = False) -> Settings:
    return Settings(
        batch_size=options.batch_size,
        engines=tuple((options.engines or engines).split(",")),  # type: ignore[arg-type]  # checked by Settings
        dtypes=("float32", "bfloat16"),
        is_training=is_training,
        rounds=options.rounds,
        device=options.device,
    )


def against_others(models: Mapping[str, Source], settings: Settings, options: argparse.Namespace) -> None:
    report = bench(models, settings, wanted=lambda key: key[0] != "naive" or key[1:] == ("eager", "float32"))
    print(report.to_text() + "\n")
    found = compare(report, peaks_of(report, models, settings) if options.memory else {})
    _print_comparison(found)
    print(json.dumps({**json.loads(report.to_json()), "benchmark": options.what, "against": found}))


def slicing(options: argparse.Namespace) -> None:
    """Sliced and unsliced models at three image sizes."""
    name = f"sret_{options.models}"
    models = {model: model for model in (f"{name}_unsliced", name, f"{name}:permutation=strided")}
    reports, shares = [], []
    for pixels, batch_size in ((224, 16), (384, 4), (512, 2)):
        settings = settings_of(options, "eager,fused,openvino")
        settings = replace(settings, batch_size=batch_size, img_size=(pixels, pixels))
        report = bench(models, settings)
        print(report.to_text() + "\n")
        shares += saved_by_slicing(report, peaks_of(report, models, settings) if options.memory else {})
        reports.append(report)
    print(f"{'saved by slicing, %':58}  MACs   time  memory")
    for share in shares:
        label = f"{share['model']}, {share['pixels']} px, {share['engine']} {share['dtype']}"
        memory = "" if share["memory"] is None else f"{share['memory']:7.1f}"
        print(f"{label:58} {share['macs']:5.1f}  {share['time']:5.1f} {memory}")
    print(json.dumps({"benchmark": "slicing", "saved": shares, "reports": [json.loads(r.to_json()) for r in reports]}))


def peaks_of(report: Report, models: Mapping[str, Source], settings: Settings) -> dict[Key, float]:
    """The peak memory of each row in MiB, measured in a process of its own."""
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    peaks = {}
    print("peak memory, MiB, without weights and optimizer state")
    for row in report.rows:
        batch, size = settings.batch_size, settings.img_size
        peak = peak_mib(models[row.model], row.engine, row.dtype, batch, size, device, settings.is_training)
        peaks[row.model, row.engine, row.dtype] = peak
        print(f"  {row.model}, {row.engine} {row.dtype}: {peak:,.0f}", flush=True)
    print()
    return peaks


def saved_by_slicing(report: Report, peaks: Mapping[Key, float]) -> list[dict[str, float | str | None]]:
    """The MACs, time and memory that slicing saves, in percent of the unsliced model's."""
    unsliced = {(row.engine, row.dtype): row for row in report.rows if row.model.endswith("_unsliced")}
    shares: list[dict[str, float | str | None]] = []
    for row in report.rows:
        whole = unsliced[row.engine, row.dtype]
        if row is whole:
            continue
        memory = _quotient(*(peaks.get((r.model, r.engine, r.dtype)) for r in (row, whole)))
        shares.append(
            {
                "model": row.model,
                "pixels": row.pixels.partition("x")[0],
                "engine": row.engine,
                "dtype": row.dtype,
                "macs": 100 * (1 - row.gmacs / whole.gmacs),
                "time": 100 * (1 - ratio(row.seconds, whole.seconds)),
                "memory": None if memory is None else 100 * (1 - memory),
            }
        )
    return shares


def compare(report: Report, peaks: Mapping[Key, float]) -> list[dict[str, float | str | None]]:
    """Compares each row of sret: speed / speed of the naive formulation, and time and memory / those of other models.

    Other models cannot be fused, so a fused model of sret is compared with the eager one.
    """
    rows = {(row.model, row.engine, row.dtype): row for row in report.rows}
    naive = "naive", "eager", "float32"
    found: list[dict[str, float | str | None]] = []
    for key, row in rows.items():
        if not row.model.startswith("sret"):
            continue
        entry: dict[str, float | str | None] = {
            "row": f"{row.model}, {row.engine} {row.dtype}",
            "speed / naive": 1 / ratio(row.seconds, rows[naive].seconds),
            "memory / naive": _quotient(peaks.get(key), peaks.get(naive)),
        }
        for peer in dict.fromkeys(other.model for other in report.rows if other.model not in (row.model, "naive")):
            other = peer, "eager" if row.engine == "fused" else row.engine, row.dtype
            entry[f"time / {peer}"] = ratio(row.seconds, rows[other].seconds) if other in rows else None
            entry[f"memory / {peer}"] = _quotient(peaks.get(key), peaks.get(other))
        found.append(entry)
    return found


def _quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _print_comparison(found: list[dict[str, float | str | None]]) -> None:
    columns = [name for name in found[0] if any(entry[name] is not None for entry in found)]
    print(" | ".join(f"{name:>28}" if name == "row" else name for name in columns))
    for entry in found:
        cells = []
        for name in columns:
            value = entry[name]
            text = value if isinstance(value, str) else "-" if value is None else f"{value:.2f}"
            cells.append(f"{text:>{28 if name == 'row' else len(name)}}")
        print(" | ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("inference", "slicing", "training"))
    parser.add_argument("--models", choices=tuple(MODELS), default="t")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--engines", help="such as eager,compile")
    parser.add_argument("--device")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory", action="store_true", help="also peak memory (memory.py)")
    options = parser.parse_args()
    {"inference": inference, "slicing": slicing, "training": training}[options.what](options)


if __name__ == "__main__":
    main()
