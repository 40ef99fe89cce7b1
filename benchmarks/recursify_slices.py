"""Measures what slices of `sret.recursify` save in the time of DeiT-Ti on this machine.

    python benchmarks/recursify_slices.py

All numbers of slices alternate in one process. Weights are random, which does not change the time.
"""

import argparse
import json
from functools import partial
from typing import Any

import timm
import torch

import sret
from sret.bench.timing import alternate, quartiles, ratio
from sret.version import device_name, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--pixels", type=int, nargs="+", default=[224, 384])
    parser.add_argument("--slices", type=int, nargs="+", default=[2, 4, 7, 14])
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [row for pixels in options.pixels for row in measure(options, pixels, device)]
    for row in rows:
        print(f"{row['pixels']:6} {row['slices']:4} slices {row['ms']:9.3f} ms {row['ratio']:6.2f}")
    print(json.dumps({"benchmark": "recursify_slices", **versions(), "device": device_name(device), "rows": rows}))


@torch.no_grad()
def measure(options: argparse.Namespace, pixels: int, device: str) -> list[dict[str, Any]]:
    """Milliseconds of a batch, and the ratio to the model without slices."""
    model = timm.create_model(options.model, img_size=pixels).eval().to(device)
    images = torch.randn(options.batch_size, 3, pixels, pixels, device=device)
    models = {1: model, **{n: sret.recursify(model, slices=(n,)) for n in options.slices}}
    times = alternate({n: partial(net, images) for n, net in models.items()}, options.rounds)
    return [
        {"pixels": pixels, "slices": n, "ms": 1e3 * quartiles(seconds)[1], "ratio": ratio(seconds, times[1])}
        for n, seconds in times.items()
    ]


if __name__ == "__main__":
    main()
