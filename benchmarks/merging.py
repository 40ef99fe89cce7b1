"""Measures token merging in one process: time against the model without merging, and accuracy of a trained model.

    python benchmarks/merging.py [--model sret_t] [--batch_sizes 1 32] [--rounds 9] [--engine onnxruntime]
    python benchmarks/merging.py --model CHECKPOINT --data DATA [--merges '[0, [[16], [8]]]']

Each row is a value of r of `sret.merge_tokens`. Before the times it checks that r = 0 gives the same outputs bit for
bit, and computes how far the other outputs are from those of the model. Models are fused, and use one thread.
`--engine` is one of `sret bench`; the largest difference between its outputs and PyTorch's, with the same r, is
printed. The order is drawn in each round, and a ratio is the median of those of all rounds. Exits before the last are
left out. The last line is JSON with the same data.
"""

import argparse
import json
from dataclasses import replace
from typing import Any

import torch

import sret
from sret.bench.candidates import Run, Subject
from sret.bench.timing import alternate, quartiles, ratio
from sret.checkpoints.resolve import resolve_sret
from sret.inference.evaluate import evaluate_on
from sret.models.variants import CONFIGS
from sret.version import versions


def default_merges(config: sret.ModelConfig) -> list[Any]:
    """1 and 4 in every pass; in the first layer of each stage a quarter, 3 in 8 and half of the tokens of a slice."""
    slices = [h * w // stage.groups[0] for (h, w), stage in zip(config.grids(), config.stages, strict=True)]
    once = [[[int(tokens * share)] for tokens in slices] for share in (1 / 4, 3 / 8, 1 / 2)]
    return [0, 1, 4, *once, [*once[-1][:-1], 0]]


def without_exits(model: sret.SReT) -> sret.SReT:
    """The model with its last exit alone."""
    plain = sret.SReT(replace(model.config, exits="none"))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("exit")})
    return plain.eval()


def possible(model: sret.SReT, merges: list[Any]) -> dict[str, sret.SReT]:
    """The model with each r that it can merge; the others are printed."""
    found = {}
    for r in merges:
        try:
            found[json.dumps(r)] = sret.merge_tokens(model, r)
        except sret.InputError as error:
            print(f"r = {r} is left out: {error}")
    return found


def distances(model: sret.SReT, models: dict[str, sret.SReT], images: torch.Tensor) -> dict[str, float]:
    """The largest difference of the logits, divided by their standard deviation."""
    with torch.inference_mode():
        expected = model(images)
        outputs = {name: merging(images) for name, merging in models.items()}
    assert torch.equal(outputs["0"], expected)
    return {name: ((y - expected).abs().max() / expected.std()).item() for name, y in outputs.items()}


def runs(models: dict[str, sret.SReT], engine: str, images: torch.Tensor) -> dict[str, Run]:
    """Each model with an engine, whose outputs are compared with PyTorch's."""
    found = {name: Subject(model, images).predicting(engine, "float32") for name, model in models.items()}
    for name, model in models.items():
        with torch.inference_mode():
            expected = model(images)
        difference = (found[name]() - expected).abs().max() / expected.std()
        print(f"r = {name}, {len(images)} images: {difference:.1e} deviations from PyTorch's outputs", flush=True)
    return found


def main() -> None:
    """Prints a row for each r."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sret_t", help="a configuration (random weights), or a weights file")
    parser.add_argument("--data", help="measures the accuracy on the test images of this data set")
    parser.add_argument("--merges", type=json.loads, help="values of r as JSON, with 0 first")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--engine", choices=("fused", "compile", "onnxruntime", "openvino"), default="fused")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    card = None
    if options.model in CONFIGS:
        model = sret.SReT(CONFIGS[options.model]).eval()
    else:
        loaded, card = resolve_sret(options.model)
        model = without_exits(loaded)
    model = sret.fuse(model)
    models = possible(model, options.merges or default_merges(model.config))
    macs = {name: sret.model_cost(merging.config).macs for name, merging in models.items()}
    print(f"{options.model}, {model.config.input_size} pixels, {options.engine}, 1 thread; {versions()}")
    images = {B: torch.randn(B, model.in_chans, *model.config.input_size) for B in options.batch_sizes}
    found = distances(model, models, images[options.batch_sizes[0]])
    rows = {name: {"r": json.loads(name), "macs": macs[name] / macs["0"], "distance": found[name]} for name in models}
    if options.data and card is not None:
        for name, merging in models.items():
            rows[name]["top1"] = evaluate_on(merging, card, options.data).metrics.top1
    for B, batch in images.items():
        with torch._dynamo.config.patch(recompile_limit=64):  # each compiled model of a class counts
            seconds = alternate(runs(models, options.engine, batch), options.rounds, warm_up=2)
        for name, times in seconds.items():
            low, median, high = quartiles(times)
            speed = ratio(seconds["0"], times)
            rows[name][f"batch {B}"] = {
                "ms": 1e3 * median,
                "iqr_ms": 1e3 * (high - low),
                "images_per_second": B / median,
            }
            rows[name][f"speed {B}"] = speed
    print(f"{'r':32} MACs   top-1   " + "   ".join(f"images/s, speed at batch {B}" for B in images))
    for name, row in rows.items():
        speeds = "   ".join(f"{row[f'batch {B}']['images_per_second']:8.1f} {row[f'speed {B}']:5.2f}" for B in images)
        print(f"{name:32} {row['macs']:.2f}   {row.get('top1', float('nan')):.2f}   {speeds}")
    about = {"model": options.model, "engine": options.engine, "versions": versions()}
    print(json.dumps(about | {"rows": list(rows.values())}))


if __name__ == "__main__":
    main()
