"""Files and command lines from strangers: whatever is in them, the answer is a result or one line, at once."""

import copy
import json
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import save
from test_cli import make_checkpoint

from sret.checkpoints.card import METADATA_KEY
from sret.checkpoints.files import read_safetensors
from sret.cli.main import main
from sret.data.preprocess import Preprocessing

LONGEST = 20  # seconds for one file or line; most take a hundredth
# What a stranger may write where something else belongs.
NUMBERS = (-1, 0, 2**31, 10**9, 10**30, 0.5, -1.5, float("nan"), float("inf"))
ODD = (None, True, *NUMBERS, "", "x", "1", "\0", [], [[]], {}, {"a": 1})
GREY = Preprocessing(img_size=(16, 16), mean=(0.5,), std=(0.5,))


@contextmanager
def at_once() -> Iterator[None]:
    """Within this context the test fails if it takes too long: something waits, or works without an end."""

    def fail(*_: object) -> None:
        raise AssertionError(f"more than {LONGEST} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def sret(capfd):
    """Runs a command; returns its exit code, after it ended at once, in a result or in one line."""

    def run(*arguments: object) -> int:
        with at_once():
            code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("sret: error: ")]
        assert code in (0, 1, 2)
        assert len(errors) == (code == 2), captured.err
        assert "Traceback" not in captured.err + captured.out
        assert "nan %" not in captured.out
        return code

    return run


def damaged(content: bytes, dice: random.Random) -> bytes:
    """The content with some of its bytes changed, cut off, repeated or moved."""
    data = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 8))):
        start = min(int(len(data) * dice.random() ** dice.choice((1, 4))), len(data) - 1)  # often near the beginning
        length = dice.choice((1, 4, 64, len(data) // 3))
        kind = dice.choice(("bits", "noise", "zeros", "ones", "cut", "drop", "repeat"))
        part = data[start : start + length]
        if kind == "bits":
            data[start] ^= 1 << dice.randrange(8)
        elif kind == "cut":
            del data[max(start, 1) :]
        elif kind == "drop" and len(data) > length:
            del data[start : start + length]
        elif kind == "repeat":
            data[start:start] = part
        else:
            filling = {"noise": dice.randbytes(len(part)), "zeros": bytes(len(part)), "ones": b"\xff" * len(part)}
            data[start : start + length] = filling.get(kind, part)
        if not data:
            return b""
    return bytes(data)


def places(values: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside nested dicts and lists."""
    for key in list(values) if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ():
        yield values, key
        yield from places(values[key])


def altered(values: Any, dice: random.Random) -> Any:
    """Nested plain values with one or two of them replaced, removed or added."""
    values = copy.deepcopy(values)
    for _ in range(dice.choice((1, 1, 2))):
        container, key = dice.choice(list(places(values)))
        kind = dice.choice(("replace", "replace", "replace", "remove", "add", "nest"))
        if kind == "remove":
            del container[key]
        elif kind == "add" and isinstance(container, dict):
            container[dice.choice(("x", "name", ""))] = dice.choice(ODD)
        elif kind == "nest":
            container[key] = [container[key]]
        else:
            container[key] = dice.choice(ODD)
        if not list(places(values)):
            break
    return values


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "m.safetensors"
    return make_checkpoint(path, training={"recipe": {"data": "digits"}})


def with_card(checkpoint: Path, change: Callable[[dict[str, Any]], object], path: Path) -> Path:
    """The same weights, with a card that says something else and a checksum that is right."""
    tensors, metadata = read_safetensors(checkpoint)
    card = json.loads(metadata[METADATA_KEY])
    card = change(card) or card
    path.write_bytes(save(tensors, {**metadata, METADATA_KEY: json.dumps(card)}))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card["config"]["stages"][2].update(embed_dim=10**9),
        lambda card: card["config"]["stages"][0].update(num_blocks=10**6),
        lambda card: card["config"]["stages"][0].update(num_blocks=9000),
        lambda card: card["config"]["stages"][2].update(groups=[1] * 10**6),
        lambda card: card["config"].update(img_size=10**6),
        lambda card: card["config"].update(img_size=[16_000, 16_000]),
        lambda card: card["config"].update(num_classes=10**6),
        lambda card: card["preprocessing"].update(img_size=[10**6, 10**6]),
        lambda card: card["preprocessing"].update(img_size=[16_000, 16_000]),
        lambda card: card["preprocessing"].update(crop_pct=1e-6),
        lambda card: card["preprocessing"].update(std=[0.0, 0.0, 0.0]),
        lambda card: card["preprocessing"].update(std=[float("nan")] * 3),
        lambda card: card["preprocessing"].update(mean=[float("inf")] * 3),
        lambda card: card["preprocessing"].update(mean=["0", "0", "0"]),
        lambda card: card["preprocessing"].update(mean=[0.5], std=[0.5]),
        lambda card: card.update(class_names="abcdefghij"),
        lambda card: card.update(training=[]),
        lambda card: card.update(training={"recipe": {"data": 5}}),
        lambda card: card.update(training={"recipe": 5}),
        lambda card: card["config"].update(reversible="no"),
        lambda card: card["config"].update(stem_stride=[8]),
        lambda card: [card],
    ],
)
def test_a_card_that_does_not_fit_its_weights_is_refused_before_anything_is_built(sret, checkpoint, tmp_path, change):
    path = with_card(checkpoint, change, tmp_path / "m.safetensors")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    assert sret("predict", tmp_path / "a.png", "--checkpoint", path) == 2
    assert sret("info", path) == 2


def test_nested_json_is_refused(sret, checkpoint, tmp_path):
    tensors, metadata = read_safetensors(checkpoint)
    (tmp_path / "m.safetensors").write_bytes(save(tensors, {**metadata, METADATA_KEY: "[" * 10**5 + "]" * 10**5}))
    assert sret("info", tmp_path / "m.safetensors") == 2


def run_weights(sret, checkpoint: Path, folder: Path, count: int) -> None:
    dice, content = random.Random(0), checkpoint.read_bytes()
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    path = folder / "m.safetensors"
    tensors, metadata = read_safetensors(checkpoint)
    for _ in range(count):
        path.write_bytes(damaged(content, dice))
        assert path.read_bytes() == content or sret("info", path) == 2
        card = altered(json.loads(metadata[METADATA_KEY]), dice)
        path.write_bytes(save(tensors, {**metadata, METADATA_KEY: json.dumps(card)}))
        # What is refused, is refused by all; what is taken, works.
        assert sret("info", path) == sret("predict", folder / "a.png", "--checkpoint", path)


def test_damaged_weights(sret, checkpoint, tmp_path):
    run_weights(sret, checkpoint, tmp_path, 10)


@pytest.mark.slow
def test_many_damaged_weights(sret, checkpoint, tmp_path):
    run_weights(sret, checkpoint, tmp_path, 150)
