"""The learned criterion: fitted on other images than those it is judged on, and the same in a batch and alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_calibrate_exit import sret, trained, without_noise  # noqa: F401
from test_exits import IMAGES, KINDS, exit_config, lively

from sret import InputError, SReT
from sret.checkpoints.card import METADATA_KEY, Card, load_weights, save_weights
from sret.checkpoints.files import read_safetensors
from sret.data.preprocess import Preprocessing
from sret.elastic import ExitPolicy, Server, predict_with_exits
from sret.elastic.calibrate import fitted, scores_of
from sret.elastic.learned import L2, fit, learned_score
from sret.export.exits import ExitGraph, exit_policy

ROW = (-1.0, 2.0, 1.0, -0.5, 1.5)


def learned(exits: int, threshold: float = 1) -> ExitPolicy:
    """A policy with other coefficients at each exit but the last."""
    rows = tuple((ROW[0] + k / 2, *ROW[1:]) for k in range(exits - 1))
    return ExitPolicy(criterion="learned", threshold=threshold, coefficients=rows)


def some_logits(exits: int = 3, images: int = 400, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are right more often if they are large, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % classes
    noise = torch.randn(exits, images, classes, generator=generator)
    signal = torch.rand(exits, images, 1, generator=generator) * torch.eye(classes)[labels]
    return 2 * noise + 6 * signal, labels


def test_the_score_is_the_formula():
    p, before = torch.tensor([[0.5, 0.3, 0.2, 0.0]]), torch.tensor([[0.1, 0.6, 0.2, 0.1]])
    entropy = -sum(x * torch.tensor(x).log() for x in (0.5, 0.3, 0.2)) / torch.tensor(4.0).log()
    for other, agreement in ((before, 0.6), (None, 0)):
        total = ROW[0] + ROW[1] * 0.5 + ROW[2] * (0.5 - 0.3) + ROW[3] * entropy + ROW[4] * agreement
        torch.testing.assert_close(learned_score(p, other, ROW), total.sigmoid()[None])
    assert learned_score(torch.ones(2, 1), None, ROW).isfinite().all()  # one class


def test_a_fit_is_the_minimum_and_draws_no_numbers():
    logits, labels = some_logits()
    found = fit(logits, labels)
    torch.manual_seed(1)
    assert fit(logits, labels) == found
    is_good = (logits.argmax(2) == labels) | (logits.argmax(2) == logits[-1].argmax(1))
    probabilities = logits.softmax(2).double()

    def loss(k: int, row: tuple[float, ...]) -> float:
        score = learned_score(probabilities[k], probabilities[k - 1] if k else None, row)
        cross_entropy = torch.nn.functional.binary_cross_entropy(score, is_good[k].double(), reduction="sum")
        return float(cross_entropy) + L2 / 2 * sum(x * x for x in row)

    for k, row in enumerate(found):
        for i in range(len(row)):
            for step in (-0.01, 0.01):  # each step away from the minimum costs
                assert loss(k, (*row[:i], row[i] + step, *row[i + 1 :])) > loss(k, row)
    assert all(abs(x) < 20 for row in fit(logits[-1:].repeat(3, 1, 1), labels) for x in row)  # all targets are 1


def test_scores_to_choose_by_are_of_coefficients_fitted_on_the_other_half():
    logits, labels = some_logits()
    policy, scores = fitted("learned", logits, labels)
    assert policy == ExitPolicy(criterion="learned", threshold=1, coefficients=fit(logits, labels))
    other = labels.clone()
    other[::2] = (other[::2] + 1) % 4
    changed = fitted("learned", logits, other)[1] != scores
    assert not changed[:, ::2].any()
    assert changed[:-1, 1::2].all()
    with pytest.raises(InputError, match="99 images; the criterion learned is fitted on 100 or more"):
        fitted("learned", logits[:, :99], labels[:99])


@pytest.mark.parametrize("exits", KINDS)
def test_images_in_batches_leave_as_they_do_alone(exits):
    model = lively(SReT(exit_config(exits)))
    with torch.inference_mode():
        every = torch.stack(model.forward_exits(IMAGES))
    scores = scores_of(learned(len(every)), every)
    probabilities, rows = every.float().softmax(2), learned(len(every)).coefficients
    for k, row in enumerate(rows):
        before = probabilities[k - 1] if k else None
        torch.testing.assert_close(scores[k], learned_score(probabilities[k], before, row))
    ranked = scores[0].sort().values
    policy = learned(len(every), float(ranked[5:7].mean()))
    logits, found = predict_with_exits(model, IMAGES, policy)
    assert found.tolist() == (scores > policy.threshold).int().argmax(0).tolist()
    assert len(set(found.tolist())) > 1
    alone = [predict_with_exits(model, image[None], policy) for image in IMAGES]
    assert found.tolist() == [int(one[1]) for one in alone]
    torch.testing.assert_close(logits, torch.cat([one[0] for one in alone]))
    served = sorted(Server(model, policy, batch_size=4).predict(IMAGES.split(5)), key=lambda result: result.number)
    assert [result.exit for result in served] == found.tolist()
    whole, last = predict_with_exits(model, IMAGES, learned(len(every)))
    assert last.unique().tolist() == [len(every) - 1]
    assert torch.equal(whole, model(IMAGES))


def test_files(tmp_path: Path):
    preprocessing = Preprocessing(img_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    model = SReT(exit_config())
    card = Card(config=model.config, preprocessing=preprocessing, exit_policy=learned(6, 0.5))
    save_weights(tmp_path / "w.safetensors", model.state_dict(), card)
    assert load_weights(tmp_path / "w.safetensors")[1] == card
    values = json.loads(read_safetensors(tmp_path / "w.safetensors")[1][METADATA_KEY])
    for wrong in ([[1.0] * 5] * 4, [[1.0] * 4] * 5, [[float("nan")] * 5] * 5, [["a"] * 5] * 5, 3, [], [1.0] * 5):
        values["exit_policy"]["coefficients"] = wrong
        with pytest.raises(InputError, match=r"coefficients|learned for 5 exits"):
            Card.from_json(json.dumps(values))
    for wrong, text in (("auto", "exit_policy is 'auto'"), ({"threshold": 1, "foo": 2}, "has no field 'foo'")):
        with pytest.raises(InputError, match=text):
            Card.from_json(json.dumps({**values, "exit_policy": wrong}))
    plain = replace(card, exit_policy=ExitPolicy(threshold=0.5))
    assert json.loads(plain.to_json())["exit_policy"] == {"criterion": "confidence", "threshold": 0.5}


def model_and_policy() -> tuple[SReT, ExitPolicy]:
    return lively(SReT(exit_config())), learned(5, 0.5)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ExitPolicy(criterion="learned", threshold=0.5), "fit them: sret calibrate-exit --criterion learned"),
        (lambda: ExitPolicy(threshold=0.5, coefficients=(ROW,)), "belong to the criterion learned, not to confidence"),
        (lambda: ExitPolicy(criterion="learned", threshold=0, coefficients=(ROW[:4],)), "must be 5 numbers"),
        (lambda: predict_with_exits(model_and_policy()[0], IMAGES, model_and_policy()[1]), "for 5 exits.* runs 6"),
        (lambda: Server(*model_and_policy()), "learned for 5 exits, and the model runs 6"),
        (lambda: ExitGraph(model_and_policy()[0], (32, 32), model_and_policy()[1]), "for 5 exits.* runs 6"),
    ],
)
def test_wrong_policies_are_one_line(make, text):
    with pytest.raises(InputError, match=text) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("without_noise")
def test_the_command_fits_and_stores_what_eval_uses(trained: Path, tmp_path: Path, capsys):  # noqa: F811
    path = tmp_path / "w.safetensors"
    path.write_bytes(trained.read_bytes())
    before = load_weights(path)[0].state_dict()
    command = ("calibrate-exit", path, "--data", "digits", "--max_drop", 50, "--criterion", "learned")
    code, out, error = sret(capsys, *command)
    assert code == 0, error
    assert f"Stored in {path}: learned above" in out
    model, card = load_weights(path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    policy = card.exit_policy
    assert policy is not None
    assert len(policy.coefficients) == model.config.num_exits
    assert exit_policy(model, card, path, 0.25) == replace(policy, threshold=0.25)
    files = ("--checkpoint", path, "--data", "digits", "--split", "val")
    code, out, error = sret(capsys, "eval", *files, "--exit", "auto")
    assert code == 0, error
    assert f"Early exit, {policy}: " in out
    code, _, error = sret(capsys, "predict", "x.png", "--checkpoint", path, "--exit", "auto", "--passes", 1)
    assert code == 2
    assert "run all passes" in error.splitlines()[-1]  # after the warning about fewer passes
    for more in ((), ("--exit", 0.9)):  # by confidence, which needs no fit
        code, out, error = sret(capsys, "eval", *files, "--passes", 1, *more)
        assert code == 0, error
        assert "top-1" in out
        assert "the learned policy for early exit does not fit these passes" in error
