"""The numbers of docs/performance.md: answers, slicing and training, each a comparison in one process.

    python benchmarks/performance.py answers   [--batch-size 16] [--models t|s]
    python benchmarks/performance.py slicing   [--engines fused,openvino]
    python benchmarks/performance.py training  [--batch-size 16]

`naive` is the authors' arithmetic over the same weights (naive.py). Weights are random, on which no time depends. Each
ends in one line of JSON, and `--figure FILE.png` draws it.
"""

import argparse
import json
from pathlib import Path

import timm
from naive import Naive
from torch import nn

import sret
from sret.bench import Report, bench
from sret.bench_report import as_text, draw
from sret.contenders import Key, Settings, Source


def naive_t() -> nn.Module:
    return Naive(_sret("sret_t"))


def naive_s() -> nn.Module:
    return Naive(_sret("sret_s"))


def _sret(name: str) -> sret.SReT:
    model = timm.create_model(name)
    assert isinstance(model, sret.SReT)
    return model


MODELS: dict[str, dict[str, Source]] = {
    "t": {
        "naive": naive_t,
        "sret_t": "sret_t",
        "deit_tiny": "deit_tiny_patch16_224",
        "pit_ti": "pit_ti_224",
    },
    "s": {
        "naive": naive_s,
        "sret_s": "sret_s",
        "deit_small": "deit_small_patch16_224",
        "swin_tiny": "swin_tiny_patch4_window7_224",
    },
}


def answers(options: argparse.Namespace) -> Report:
    """Every engine and dtype; the naive formulation in eager float32 alone."""
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
    """Sliced and unsliced, at three sizes: the share of time against the share of multiply-adds."""
    reports = []
    name = f"sret_{options.models}"
    for pixels, batch_size in ((224, 16), (384, 4), (512, 2)):
        settings = Settings(
            batch_size=batch_size,
            image_size=(pixels, pixels),
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
    """Shares of the unsliced model's multiply-adds, time and memory that slicing saves, in percent."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("answers", "slicing", "training"))
    parser.add_argument("--models", choices=tuple(MODELS), default="t")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--engines", help="several, with commas")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory", action="store_true", help="peak memory too; each contender in a process of its own")
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
    report = {"answers": answers, "training": training}[options.what](options)
    print(as_text(report) + "\n")
    print(report.to_json())
    if options.figure is not None:
        draw(report, options.figure)


if __name__ == "__main__":
    main()
