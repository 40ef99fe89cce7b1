"""Measures the numbers of docs/performance.md: inference, slicing and training, each in one process.

    python benchmarks/performance.py inference [--batch-size 16] [--models t|s]
    python benchmarks/performance.py slicing   [--engines fused,openvino]
    python benchmarks/performance.py training  [--batch-size 16]

`naive` is the authors' arithmetic with the same weights (naive.py). Weights are random, which does not change the time.
The last line of the output is JSON with the same data; `--figure FILE.png` draws a figure.
"""

import argparse
import json
from pathlib import Path

import timm
from naive import Naive
from torch import nn

import sret
from sret.bench.candidates import Key, Settings, Source
from sret.bench.report import as_text, draw
from sret.bench.runner import Report, bench
from sret.bench.timing import ratio


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


def inference(options: argparse.Namespace) -> Report:
    """All engines and data types; the naive formulation only in eager float32."""
    engines = tuple((options.engines or "eager,fused,compile,onnxruntime,openvino").split(","))
    settings = Settings(
        batch_size=options.batch_size,
        engines=engines,
        dtypes=("float32", "bfloat16"),
        threads=options.threads,
        rounds=options.rounds,
        memory=options.memory,
        device=options.device,
    )
    return bench(MODELS[options.models], settings, wanted=_naive_once)


def _naive_once(key: Key) -> bool:
    return key[0] != "naive" or key[1:] == ("eager", "float32")


def training(options: argparse.Namespace) -> Report:
    settings = Settings(
        batch_size=options.batch_size,
        engines=tuple((options.engines or "eager,compile").split(",")),
        dtypes=("float32", "bfloat16"),
        is_training=True,
        threads=options.threads,
        rounds=options.rounds,
        memory=options.memory,
        device=options.device,
    )
    models = MODELS[options.models]
    return bench({name: models[name] for name in list(models)[:3]}, settings, wanted=_naive_once)


def slicing(options: argparse.Namespace) -> list[Report]:
    """Sliced and unsliced models at three image sizes."""
    reports = []
    name = f"sret_{options.models}"
    for pixels, batch_size in ((224, 16), (384, 4), (512, 2)):
        settings = Settings(
            batch_size=batch_size,
            img_size=(pixels, pixels),
            engines=tuple((options.engines or "eager,fused,openvino").split(",")),
            dtypes=("float32", "bfloat16"),
            threads=options.threads,
            rounds=options.rounds,
            memory=options.memory,
            device=options.device,
        )
        reports.append(bench([f"{name}_unsliced", name, f"{name}:permutation=strided"], settings))
    return reports


def saved_by_slicing(report: Report) -> list[dict[str, float | str | None]]:
    """The MACs, time and memory that slicing saves, in percent of the unsliced model's."""
    unsliced = {(row.engine, row.dtype): row for row in report.rows if row.model.endswith("_unsliced")}
    shares: list[dict[str, float | str | None]] = []
    for row in report.rows:
        whole = unsliced[row.engine, row.dtype]
        if row is whole or row.vs_first_model is None:
            continue
        memory = None
        if row.peak_mib is not None and whole.peak_mib is not None:
            memory = 100 * (1 - row.peak_mib / whole.peak_mib)
        shares.append(
            {
                "model": row.model,
                "pixels": row.pixels[0],
                "engine": row.engine,
                "dtype": row.dtype,
                "macs": 100 * (1 - row.macs / whole.macs),
                "time": 100 * (1 - row.vs_first_model),
                "memory": memory,
            }
        )
    return shares


def compare(report: Report) -> list[dict[str, float | str | None]]:
    """Compares each row of sret: speed / speed of the naive formulation, and time and memory / those of other models.

    Other models cannot be fused, so a fused model of sret is compared with the eager one.
    """
    rows = {(row.model, row.engine, row.dtype): row for row in report.rows}
    naive = rows["naive", "eager", "float32"]
    found: list[dict[str, float | str | None]] = []
    for row in report.rows:
        if not row.model.startswith("sret"):
            continue
        entry: dict[str, float | str | None] = {
            "row": f"{row.model}, {row.engine} {row.dtype}",
            "speed / naive": 1 / ratio(row.seconds, naive.seconds),
            "memory / naive": _quotient(row.peak_mib, naive.peak_mib),
        }
        for peer in dict.fromkeys(other.model for other in report.rows if other.model not in (row.model, "naive")):
            other = rows.get((peer, "eager" if row.engine == "fused" else row.engine, row.dtype))
            entry[f"time / {peer}"] = ratio(row.seconds, other.seconds) if other else None
            entry[f"memory / {peer}"] = _quotient(row.peak_mib, other.peak_mib) if other else None
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
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory", action="store_true", help="also peak memory, each model in a process of its own")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    if options.what == "slicing":
        reports = slicing(options)
        shares = [share for report in reports for share in saved_by_slicing(report)]
        for report in reports:
            print(as_text(report) + "\n")
        print(f"{'saved by slicing, %':58}  MACs   time  memory")
        for share in shares:
            name = f"{share['model']}, {share['pixels']} px, {share['engine']} {share['dtype']}"
            memory = "" if share["memory"] is None else f"{share['memory']:7.1f}"
            print(f"{name:58} {share['macs']:5.1f}  {share['time']:5.1f} {memory}")
        print(
            json.dumps({"benchmark": "slicing", "saved": shares, "reports": [json.loads(r.to_json()) for r in reports]})
        )
        return
    report = {"inference": inference, "training": training}[options.what](options)
    print(as_text(report) + "\n")
    found = compare(report)
    _print_comparison(found)
    print(json.dumps({**json.loads(report.to_json()), "benchmark": options.what, "against": found}))
    if options.figure is not None:
        draw(report, options.figure)


if __name__ == "__main__":
    main()
