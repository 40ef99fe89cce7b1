"""`sret calibrate-exit`: accuracy and time of thresholds, and the fastest one, which eval and predict then use."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_exits import IMAGES, exit_config, lively
from test_train import RECIPE

from sret import SReT, model_cost
from sret.bench import exits as exits_bench
from sret.bench.exits import Speed, Timed, fastest, time_exits, to_time
from sret.checkpoints.adapt import with_passes
from sret.checkpoints.card import Card, load_weights, save_weights
from sret.checkpoints.files import stored_checksum
from sret.cli import main as cli
from sret.data.preprocess import Preprocessing
from sret.elastic import ExitPolicy, batches, predict_with_exits
from sret.elastic.calibrate import Outcome, acceptable, outcomes, scores_of
from sret.errors import InputError, InputWarning
from sret.export.exits import exit_policy
from sret.inference.exits import store_policy


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file for digits with exits, of random weights that differ at each exit."""
    config = replace(RECIPE.model_config(), exits="passes")
    torch.manual_seed(0)
    model = SReT(config)
    with torch.no_grad():
        for head in (*model.exits, model.head):
            head.weight.mul_(8)
    path = tmp_path_factory.mktemp("exits") / "best.safetensors"
    preprocessing = Preprocessing(img_size=(16, 16), mean=(0.5,), std=(0.5,))
    save_weights(path, model.state_dict(), Card(config=config, preprocessing=preprocessing))
    return path


def sret(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_outcomes_are_those_of_running_the_policy():
    model = lively(SReT(exit_config()))
    labels = torch.arange(len(IMAGES)) % 5
    with torch.inference_mode():
        logits = torch.stack(model.forward_exits(IMAGES))
    costs = model_cost(model.config).exit_macs
    for criterion in ("confidence", "agreement"):
        scores = scores_of(ExitPolicy(criterion=criterion, threshold=1), logits)
        found = outcomes(scores, logits.argmax(2) == labels, costs)
        for row in found:
            policy = ExitPolicy(criterion=criterion, threshold=row.threshold)
            predicted, exits = predict_with_exits(model, IMAGES, policy)
            assert row.counts == tuple(exits.bincount(minlength=6).tolist())
            assert row.top1 == pytest.approx(100 * (predicted.argmax(1) == labels).double().mean().item())
            assert row.share == pytest.approx(sum(costs[k] for k in exits.tolist()) / len(IMAGES) / costs[-1])
        assert acceptable(found, 100) == found
        assert min(row.top1 for row in acceptable(found, 9)) >= found[-1].top1 - 9


def outcome(threshold: float, top1: float, share: float) -> Outcome:
    return Outcome(threshold, top1, share, (round(1000 * threshold), 1))


def test_the_fastest_threshold_loses_little_and_is_faster_than_the_model_in_a_batch_too():
    rows = [
        Timed(outcome(1, 90, 1), Speed(90, 390)),
        Timed(outcome(0.9, 89.8, 0.8), Speed(120, 450)),
        Timed(outcome(0.7, 89.7, 0.7), Speed(130, 399)),
        Timed(outcome(0.5, 89.7, 0.6), Speed(125, 500)),  # fewer MACs, but slower alone
        Timed(outcome(0.3, 89.6, 0.5), Speed(200, 600)),
    ]
    assert [fastest(Speed(100, 400), rows, drop).outcome.threshold for drop in (0.31, 0.41)] == [0.5, 0.3]
    assert fastest(Speed(100, 395), rows, 0.31).outcome.threshold == 0.7
    for whole in (Speed(201, 400), Speed(100, 601)):
        assert fastest(whole, rows, 1).outcome.threshold == 1
    noisy = [replace(rows[0], speed=Speed(300, 700)), *rows[1:]]  # threshold 1, measured too fast; not to be chosen
    assert fastest(Speed(100, 400), noisy, 0.31).outcome.threshold == 0.5


def test_thresholds_that_can_be_the_fastest_are_timed():
    found = [outcome(i / 40, 50 + i, i / 40) for i in range(41)]
    for max_drop in (0, 3, 12.5, 100):
        rows = to_time(found, max_drop, most=8)
        assert len(rows) <= 8
        assert rows[0].threshold == 1
        allowed = [row for row in acceptable(found, max_drop) if row.threshold < 1]
        assert set(allowed[:4]) <= set(rows)
    same = [replace(row, counts=(5, 5)) for row in found]
    assert to_time(same, 1) == [same[-1]]


def test_an_image_takes_the_time_of_the_parts_before_its_exit(monkeypatch: pytest.MonkeyPatch):
    model = lively(SReT(exit_config()))
    ran: list[int] = []
    parts = [
        replace(part, run=lambda x, run=part.run, k=k: (ran.append(k), run(x))[1])
        for k, part in enumerate(batches.checked_parts(model, IMAGES, ExitPolicy(threshold=1)))
    ]
    monkeypatch.setattr(batches, "checked_parts", lambda *_: parts)

    def alternate(calls: dict, rounds: int) -> dict:
        seconds = {}
        for key, call in calls.items():
            ran.clear()
            call()
            seconds[key] = [1 + max(ran, default=11)]  # the whole model takes 12 seconds
        return seconds

    monkeypatch.setattr(exits_bench, "alternate", alternate)
    policy = ExitPolicy(threshold=1)
    with torch.inference_mode():
        logits = torch.stack(model.forward_exits(IMAGES))
    found = outcomes(scores_of(policy, logits), logits.argmax(2) == 0, model_cost(model.config).exit_macs)
    whole, timed = time_exits(model, policy, found, IMAGES)
    assert whole == Speed(1 / 12, 1)
    for row in timed:
        deepest = max(k for k, count in enumerate(row.outcome.counts) if count)
        seconds = sum((k + 1) * count for k, count in enumerate(row.outcome.counts)) / 12
        assert vars(row.speed) == pytest.approx({"alone": 1 / seconds, "batched": 12 / (deepest + 1)})


@pytest.fixture
def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are measured, but then those of a machine without noise: an exit costs as much as the passes before it."""
    measure = exits_bench._seconds

    def seconds(calls: dict, rounds: int) -> dict:
        assert all(value > 0 for value in measure(calls, rounds).values())
        return {key: 9 if key in (-1, ()) else 1 + (key if isinstance(key, int) else max(key)) for key in calls}

    monkeypatch.setattr(exits_bench, "_seconds", seconds)


@pytest.mark.usefixtures("without_noise")
def test_the_command_stores_a_threshold_that_eval_and_predict_use(trained: Path, capsys, tmp_path: Path, monkeypatch):
    before, card = load_weights(trained)
    files = ("--data", "digits", "--checkpoint", trained)
    code, _, error = sret(capsys, "eval", *files, "--exit", "auto")
    assert (code, error.count("\n")) == (2, 1)
    assert "calibrate-exit" in error
    figure = tmp_path / "f.png"
    command = ("calibrate-exit", trained, "--data", "digits", "--max_drop", 50)
    code, out, error = sret(capsys, *command, "--figure", figure, "--json")
    assert code == 0, error
    found = json.loads(out)
    assert Image.open(figure).size > (500, 300)
    assert set(found["whole_images_per_second"]) == {"alone", "batched"}
    chosen = next(row for row in found["rows"] if row["threshold"] == found["threshold"])
    whole = found["rows"][0]
    assert whole["threshold"] == 1
    assert chosen["share"] < 1
    assert chosen["top1"] >= whole["top1"] - 50
    model, stored = load_weights(trained)
    assert stored == replace(card, exit_policy=ExitPolicy(criterion="confidence", threshold=found["threshold"]))
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in model.state_dict().items())
    code, out, _ = sret(capsys, "eval", *files, "--exit", "auto", "--split", "val", "--json")
    assert json.loads(out)["exits"] == chosen["counts"]
    assert json.loads(out)["top1"] == pytest.approx(chosen["top1"])
    assert f"Early exit: confidence above {found['threshold']:g}" in sret(capsys, "info", trained)[1]
    assert "Early exit, confidence above 0.5: " in sret(capsys, "eval", *files, "--exit", "0.5", "--split", "val")[1]
    with pytest.warns(InputWarning, match="chosen with all passes"):
        exit_policy(with_passes(*load_weights(trained), 1)[0], stored, trained, "auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "by one process" in sret(capsys, "eval", *files, "--exit", "auto")[2]
    monkeypatch.delenv("WORLD_SIZE")
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    for options, threshold in (((), None), (("--exit", "0"), 0)):
        out = sret(capsys, "predict", tmp_path / "a.png", "--checkpoint", trained, "--json", *options)[1]
        assert json.loads(out).get("exit") == (None if threshold is None else 1)
        image = torch.full((1, 1, 16, 16), -1.0)
        logits = model(image) if threshold is None else predict_with_exits(model, image, ExitPolicy(threshold=0))[0]
        assert json.loads(out)["prediction"] == str(int(logits.argmax()))
    predict = ("predict", tmp_path / "a.png", "--checkpoint", trained, "--exit", 0)
    assert sret(capsys, *predict)[1].endswith("   (exit 1)\n")
    assert sret(capsys, *predict, "--out", tmp_path / "t.jsonl")[0] == 0
    assert json.loads((tmp_path / "t.jsonl").read_text())["exit"] == 1


def test_a_threshold_is_not_stored_for_weights_that_were_replaced(trained: Path, tmp_path: Path):
    path, (model, card) = tmp_path / "w.safetensors", load_weights(trained)
    save_weights(path, {key: value + 1 for key, value in model.state_dict().items()}, card)
    replaced = path.read_bytes()
    with pytest.raises(InputError, match="was replaced meanwhile"):
        store_policy(path, ExitPolicy(threshold=0.5), stored_checksum(trained))
    assert path.read_bytes() == replaced


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("eval", "--checkpoint", "{plain}", "--exit", "0.5", "--data", "digits"), "has no exits; give no more passes"),
        (("eval", "--checkpoint", "{trained}", "--exit", "1.5", "--data", "digits"), "a number >= 0 and <= 1"),
        (("predict", "x.png", "--checkpoint", "{trained}", "--exit=-1"), "a number >= 0 and <= 1"),
        (("predict", "x.png", "--checkpoint", "{plain}", "--exit", "auto"), "has no exits; give no more passes"),
        (("calibrate-exit", "{plain}", "--data", "digits"), "has no exits; give no more passes"),
        (("calibrate-exit", "sret_t.dist_in1k"), "a weights file of sret, NAME.safetensors"),
        (("calibrate-exit", "{trained}", "--data", "digits", "--max_drop=-1"), "max_drop: must be a number >= 0"),
        (("calibrate-exit", "{trained}", "--data", "digits", "--figure", "f.jpg"), "the figure ends in .png"),
        (
            ("calibrate-exit", "{trained}", "--data", "digits", "--figure", "{plain}/f.png"),
            "is not a folder that can be",
        ),
    ],
)
def test_wrong_options_are_one_line(trained: Path, tmp_path: Path, capsys, arguments, text):
    model = SReT(replace(RECIPE.model_config(), exits="none"))
    preprocessing = Preprocessing(img_size=(16, 16), mean=(0.5,), std=(0.5,))
    save_weights(tmp_path / "p.safetensors", model.state_dict(), Card(config=model.config, preprocessing=preprocessing))
    paths = {"plain": tmp_path / "p.safetensors", "trained": trained}
    code, _, error = sret(capsys, *(argument.format(**paths) for argument in arguments))
    assert (code, error.count("\n")) == (2, 1)
    assert text in error
