"""The authors' release, number by number: logits, stage outputs, loss and gradients that it recorded."""

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from sret import ModelConfig, SReT, StageConfig
from sret.checkpoints.official import from_official, official_keys
from sret.layers import replay

# By name: blocks, slices and MLP ratio of the recorded model.
RECORDINGS = {
    "sliced_small": ((1, 2, 1), ((8, 2), (4, 1), (1, 1)), 3.6),
    "sliced_small_permute_two_stages": ((2, 2, 1), ((16, 4), (4, 2), (1, 1)), 4.0),
    "unsliced_small": ((1, 2, 1), ((1, 1), (1, 1), (1, 1)), 3.6),
}


@pytest.fixture(params=RECORDINGS)
def recording(request):
    blocks, groups, mlp_ratio = RECORDINGS[request.param]
    stages = tuple(
        StageConfig(embed_dim=8 * h, num_heads=h, num_blocks=b, groups=g, mlp_ratio=mlp_ratio, projection_ratio=1.0)
        for h, b, g in zip((2, 4, 8), blocks, groups, strict=True)
    )
    config = ModelConfig(stages=stages, img_size=64, num_classes=10)
    record = load_file(DATA / f"{request.param}.safetensors")
    model = SReT(config)
    official = {key.removeprefix("weight."): t for key, t in record.items() if key.startswith("weight.")}
    model.load_state_dict(from_official(official, config))
    return model, record


def permutations(record: dict[str, torch.Tensor], mode: str) -> list[torch.Tensor]:
    count = sum(key.startswith(f"{mode}.permutation") for key in record)
    return [record[f"{mode}.permutation{i}"] for i in range(count)]


def undo_the_recorded_step(model: SReT, record: dict[str, torch.Tensor]) -> None:
    """Takes BatchNorm's running statistics back to before the recorded training step.

    The recorded evaluation ran first, on the statistics before that step; the recorded weights hold those after it
    (`num_batches_tracked` is 1). The step moved them a tenth of the way to the statistics of the recorded batch.
    """
    batch: dict[str, torch.Tensor] = {}
    norms = {name: getattr(model.stem, name) for name in ("bn1", "bn2", "bn3")}
    before = {name: (bn.running_mean.clone(), bn.running_var.clone()) for name, bn in norms.items()}
    hooks = [
        bn.register_forward_pre_hook(lambda _, args, name=name: batch.__setitem__(name, args[0]))
        for name, bn in norms.items()
    ]
    with torch.no_grad():
        model.train().stem(record["input"])
    for hook in hooks:
        hook.remove()
    for name, bn in norms.items():
        assert record[f"weight.patch_embed.{name}.num_batches_tracked"] == 1
        x, (mean, var) = batch[name], before[name]
        bn.running_mean.copy_((mean - 0.1 * x.mean((0, 2, 3))) / 0.9)
        bn.running_var.copy_((var - 0.1 * x.var((0, 2, 3))) / 0.9)


def test_evaluation_gives_the_recorded_outputs(recording):
    model, record = recording
    undo_the_recorded_step(model, record)
    with torch.no_grad(), replay(permutations(record, "eval")):
        maps = model.eval().forward_intermediates(record["input"], intermediates_only=True)
    for i, feature_map in enumerate(maps):
        torch.testing.assert_close(feature_map, record[f"eval.stage{i}"], atol=1e-5, rtol=0)
    with torch.no_grad(), replay(permutations(record, "eval")):
        torch.testing.assert_close(model(record["input"]), record["eval.logits"], atol=1e-5, rtol=0)


def test_a_training_step_has_the_recorded_loss_and_gradients(recording):
    model, record = recording
    model = model.double()  # so that the rounding compared is the recording's alone
    with replay(permutations(record, "train")):
        loss = cross_entropy(model.train()(record["input"].double()), torch.tensor([0, 1]))
    torch.testing.assert_close(loss.float(), record["train.loss"], atol=1e-5, rtol=0)
    loss.backward()
    names = official_keys(model.config)
    assert sum(key.startswith("train.grad.") for key in record) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        expected = record[f"train.grad.{names[key][0]}"]
        # A bias before BatchNorm has no effect: both sides hold rounding errors of zero, below 1e-6.
        is_zero = key in ("stem.conv1.bias", "stem.conv2.bias", "stem.conv3.bias")
        error = (parameter.grad - expected).norm()
        assert error <= (1e-5 if is_zero else 1e-4 * expected.norm()), f"{key}: {error} of {expected.norm()}"
