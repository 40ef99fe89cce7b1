"""Trains deep models on the digits with one change at a time: initialisation, scale, norms, warm-up, clipping.

    OMP_NUM_THREADS=1 python benchmarks/depth_ways.py --layers 108 --runs RUNS --out results.jsonl
    OMP_NUM_THREADS=1 python benchmarks/depth_ways.py --layers 1008 --epochs 4 --runs RUNS --out results.jsonl

Each variant is trained with recipes/digits_deep.yaml, without other changes (except --epochs, with warm-up in
proportion), and appends a line of JSON to --out. A run that is finished in --runs is not trained again, and an
interrupted one is resumed. `--ways` selects some variants, so that several processes can share the work. A layer is one
pass of attention and MLP.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from depth import DEPTHS, add, deep, digits, recipe_for, stream_and_gradient
from torch import Tensor, nn

from sret import InputError, SReT
from sret.checkpoints.card import load_weights
from sret.inference.evaluate import evaluate_on
from sret.layers import LearnableResidual, Recursion
from sret.models.config import ResidualScale
from sret.training.loop import train
from sret.training.run_dir import BEST, METRICS
from sret.version import versions

NormPlace = Literal["before", "on the branch", "on the stream"]


@dataclass(frozen=True)
class Way:
    """One variant: initial coefficients and their scale, position of the norms, warm-up, clipping."""

    scale: ResidualScale = "passes"
    first_beta: Callable[[int], float] = lambda passes: 1.0
    norm: NormPlace = "before"
    warms_up: bool = True
    clips: bool = True


WAYS = {
    "as chosen": Way(),
    "as published": Way("one"),
    "scale 1/sqrt(passes)": Way("sqrt"),
    "as published, beta begins at 0": Way("one", lambda passes: 0.0),
    "as published, beta begins at 1/sqrt(passes)": Way("one", lambda passes: passes**-0.5),
    "as published, beta begins at 1/passes": Way("one", lambda passes: 1 / passes),
    "norm on the branch": Way(norm="on the branch"),
    "norm on the stream": Way(norm="on the stream"),
    "as published, norm on the stream": Way("one", norm="on the stream"),
    "no warm-up": Way(warms_up=False),
    "no clipping": Way(clips=False),
    "neither": Way(warms_up=False, clips=False),
    "beta begins at 0, neither": Way("one", lambda passes: 0.0, warms_up=False, clips=False),
    "beta begins at 1/passes, neither": Way("one", lambda passes: 1 / passes, warms_up=False, clips=False),
}


def norm_on_branch(self: LearnableResidual, x: Tensor, *args: Any) -> Tensor:
    """x <- alpha x + s beta norm(f(x))."""
    return summed(self, x, self.norm(self.branch(x, *args)))


def norm_on_stream(self: LearnableResidual, x: Tensor, *args: Any) -> Tensor:
    """x <- norm(alpha x + s beta f(x)), as in the first transformer."""
    return self.norm(summed(self, x, self.branch(x, *args)))


def summed(residual: LearnableResidual, x: Tensor, y: Tensor) -> Tensor:
    alpha, beta = residual.stream_factor(), residual.branch_factor()
    assert alpha is not None
    assert beta is not None
    return alpha * x + beta * residual.drop_path(y)


FORWARD = {
    "before": LearnableResidual.forward,
    "on the branch": norm_on_branch,
    "on the stream": norm_on_stream,
}


@contextmanager
def built(way: Way) -> Iterator[None]:
    """Models that are created in this context have the initial coefficients and norms of `way`."""
    make = SReT.__init__

    def begin(self: SReT, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        for recursion in self.modules():
            if isinstance(recursion, Recursion):
                for part in recursion.modules():
                    if isinstance(part, LearnableResidual) and part.beta is not None:
                        nn.init.constant_(part.beta, way.first_beta(len(recursion.projections)))

    with (
        patch.object(SReT, "__init__", begin),
        patch.object(LearnableResidual, "forward", FORWARD[way.norm]),
    ):
        yield


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains and tests one variant."""
    way = WAYS[name]
    config = deep(options.layers, way.scale)
    recipe = recipe_for(config, options.seed)
    warmup_epochs = recipe.warmup_epochs * options.epochs / recipe.epochs  # the same part of the run
    recipe = replace(recipe, epochs=options.epochs, warmup_epochs=warmup_epochs if way.warms_up else 0)
    if not way.clips:
        recipe = replace(recipe, clip_grad=None)
    slug = name.translate(str.maketrans(" /,", "___"))
    out = options.runs / f"{options.layers}_{options.epochs}_{options.seed}_{slug}"
    with built(way):
        torch.manual_seed(options.seed)
        first = stream_and_gradient(SReT(config), *digits(config))
        line = {
            "kind": "way",
            "layers": config.depth,
            "way": name,
            "seed": options.seed,
            "epochs": options.epochs,
            "activation": [rounded(first["activation"][i]) for i in (0, -1)],
            "gradient": [rounded(first["gradient"][i]) for i in (0, -1)],
            "weights_gradient": rounded(first["weights_gradient"][0]),
        }
        try:
            train(recipe, out, resume="auto")
        except InputError as error:
            if "not finite" not in str(error):
                raise
            return {**line, "lost": str(error), **versions()}
        model, card = load_weights(out / BEST)
        tested = evaluate_on(model, card).metrics
    rows = [json.loads(row) for row in (out / METRICS).read_text().splitlines()]
    kept = ("epoch", "train_loss", "val_loss", "val_top1")
    line["rows"] = [{key: round(row[key], 4) for key in kept} for row in rows]
    return {**line, "test_top1": round(tested.top1, 2), **versions()}


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, choices=DEPTHS, default=108)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    for name in options.ways:
        line = measure(name, options)
        a, g = line["activation"], line["gradient"]
        result = "not finite" if "lost" in line else f"{line['test_top1']:.2f} %"
        print(
            f"{line['way']:46} stream {a[0]:.3g} .. {a[1]:.3g}  gradient {g[0]:.2e} .. {g[1]:.2e}  {result}", flush=True
        )
        add(options.out, line)


if __name__ == "__main__":
    main()
