"""Files and command lines from strangers: whatever is in them, the answer is a result or one line, at once."""

import copy
import io
import json
import os
import random
import shutil
import signal
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import yaml
from conftest import small_config
from PIL import Image, features
from pyarrow import parquet
from safetensors.torch import load_file, save
from test_cli import make_checkpoint

from sret import InputError, SReT
from sret.checkpoints.adapt import transfer_file
from sret.checkpoints.card import METADATA_KEY
from sret.checkpoints.files import CHECKSUM_KEY, checksum, read_pickle, read_safetensors
from sret.checkpoints.official import read_official, to_official
from sret.checkpoints.state import load_state, save_state
from sret.cli.main import LONGEST_MESSAGE, main
from sret.data.loading import ImageDataset
from sret.data.preprocess import Preprocessing
from sret.data.sampler import SampleIndex
from sret.data.sources import load_data
from sret.export.runtime import seal
from sret.safe_yaml import read_yaml
from sret.training.config import RuntimeConfig, TrainConfig
from sret.training.distillation.config import Distillation
from sret.training.distillation.precompute import write_soft_labels
from sret.training.distillation.soft_labels import MANIFEST, SoftLabelDataset, shard_path
from sret.training.run_dir import STATE

pytestmark = pytest.mark.usefixtures("quick_report")

LONGEST = 20  # seconds for one file or line; most take a hundredth
# What a stranger may write where something else belongs.
NUMBERS = (-1, 0, 2**31, 10**9, 10**30, 0.5, -1.5, float("nan"), float("inf"))
ODD = (None, True, *NUMBERS, "", "x", "1", "\0", [], [[]], {}, {"a": 1})
# How many files or lines of a kind are tried.
COUNTS = pytest.mark.parametrize("count", [10, pytest.param(1000, marks=pytest.mark.slow)])
HALF = pytest.mark.parametrize("count", [10, pytest.param(500, marks=pytest.mark.slow)])
GREY = Preprocessing(img_size=(16, 16), mean=(0.5,), std=(0.5,))


class TooLong(BaseException):
    """Not an `Exception`, which a guard against odd errors of other libraries would catch."""


@contextmanager
def at_once() -> Iterator[None]:
    """Within this context the test fails if it takes too long: something waits, or works without an end."""

    def fail(*_: object) -> None:
        raise TooLong(f"more than {LONGEST} seconds")

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
        assert code == 1 or len(errors) == (code == 2), captured.err
        assert all(len(line) < LONGEST_MESSAGE + 50 for line in errors)
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


def altered(values: Any, dice: random.Random, odd: Any = ODD) -> Any:
    """Nested plain values with one or two of them replaced, removed or added."""
    values = copy.deepcopy(values)
    for _ in range(dice.choice((1, 1, 2))):
        container, key = dice.choice(list(places(values)))
        kind = dice.choice(("replace", "replace", "replace", "remove", "add", "nest"))
        if kind == "remove":
            del container[key]
        elif kind == "add" and isinstance(container, dict):
            container[dice.choice(("x", "name", ""))] = dice.choice(odd)
        elif kind == "nest":
            container[key] = [container[key]]
        else:
            container[key] = dice.choice(odd)
        if not list(places(values)):
            break
    return values


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "m.safetensors"
    return make_checkpoint(path, training={"recipe": {"data": "digits"}})


def write_weights(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file with a checksum that is right."""
    path.write_bytes(save(tensors, {**metadata, CHECKSUM_KEY: checksum(tensors, metadata)}))


def with_card(checkpoint: Path, change: Callable[[dict[str, Any]], object], path: Path) -> Path:
    """The same weights, with a card that says something else and a checksum that is right."""
    tensors, metadata = read_safetensors(checkpoint)
    card = json.loads(metadata[METADATA_KEY])
    card = change(card) or card
    write_weights(path, tensors, {**metadata, METADATA_KEY: json.dumps(card)})
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
    write_weights(tmp_path / "m.safetensors", tensors, {**metadata, METADATA_KEY: "[" * 10**5 + "]" * 10**5})
    assert sret("info", tmp_path / "m.safetensors") == 2


@COUNTS
def test_damaged_weights(count, sret, checkpoint, tmp_path):
    dice, content = random.Random(0), checkpoint.read_bytes()
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    path = tmp_path / "m.safetensors"
    tensors, metadata = read_safetensors(checkpoint)
    for _ in range(count):
        path.write_bytes(damaged(content, dice))
        assert path.read_bytes() == content or sret("info", path) == 2
        card = altered(json.loads(metadata[METADATA_KEY]), dice)
        write_weights(path, tensors, {**metadata, METADATA_KEY: json.dumps(card)})
        # What is refused, is refused by all; what is taken, works.
        assert sret("info", path) == sret("predict", tmp_path / "a.png", "--checkpoint", path)


@COUNTS
def test_damaged_weights_of_the_authors(count, tmp_path):
    dice, model, file = random.Random(0), SReT(small_config()), io.BytesIO()
    torch.save({"model": to_official(model.state_dict(), model.config)}, file)
    path, content = tmp_path / "m.pth", file.getvalue()
    for _ in range(count):
        path.write_bytes(damaged(content, dice))
        expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        try:
            with at_once():
                transfer_file(model, path)
        except InputError:
            continue
        assert all(torch.equal(expected[key], tensor) for key, tensor in model.state_dict().items())


def test_pickles_that_would_fill_the_memory_are_refused(tmp_path):
    path = tmp_path / "m.pth"
    torch.save({"w": torch.ones(1).expand(10**12)}, path)
    with at_once(), pytest.raises(InputError, match="more values than the file"):
        read_official(path)
    torch.save({"w": torch.zeros(10**7)}, tmp_path / "large.pth")
    with zipfile.ZipFile(tmp_path / "large.pth") as large, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for member in large.namelist():
            small.writestr(member, large.read(member))
    with at_once(), pytest.raises(InputError, match="compressed"):
        read_pickle(path)


# Recipes and lines ----------------------------------------------------------------------------------------------------

RECIPE = {
    "data": "digits",
    "model": {"img_size": 8, "stem_stride": 4, "stages": [{"embed_dim": 4, "num_heads": 1, "num_blocks": 1}]},
    "epochs": 2,
    "batch_size": 32,
    "warmup_epochs": 0.5,
    "augmentation": {"geometry": "none", "flip": False},
}
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.fixture
def train(sret, tmp_path):
    """Trains one step with a recipe, given as text or values, and more options; returns the exit code."""

    def run(recipe: Any = RECIPE, *options: object) -> int:
        text = recipe if isinstance(recipe, str | bytes) else yaml.safe_dump(recipe)
        (tmp_path / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        out = tmp_path / "out"
        code = sret("train", "--config", tmp_path / "recipe.yaml", "--out", out, "--max_steps", 1, *options)
        assert code == 0 or not out.exists()
        shutil.rmtree(out, ignore_errors=True)
        return code

    return run


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "model: &a {stages: *a}",
        "model: " + "[" * 500,
        "model: " + "{a: " * 500,
        "data: digits\ndata: mnist",
        'data: "\\0"',
        'data: ""',
        "epochs: " + "9" * 5000,
        "epochs: 1e400",
        "weight_decay: .inf",
        "mixup: .nan",
        "learning_rate: " + "9" * 400,
        "model: null",
        "data: null",
        "augmentation: null",
        "augmentation: {flip: null}",
        "trackers: [null]",
        "freeze: 3",
        "init: [x]",
        "x" * 10**5,
        "x" * 10**5 + ": 1",
        "x: " + "y" * 10**5,
        "#" * 2**21,
        "- a",
        "",
        b"\xff\xfe",
        b"\0",
    ],
    ids=lambda text: repr(text[:20]),
)
def test_recipes_that_are_refused(train, text):
    rest = {} if isinstance(text, bytes) else {key: value for key, value in RECIPE.items() if f"{key}:" not in text}
    assert train(text if isinstance(text, bytes) or text in ("", "- a") else f"{text}\n{yaml.safe_dump(rest)}") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than 100,000 values"),
        ("&a [*a]", "contain themselves"),
        ("[" * 500, "nested deeper than 40 levels"),
        ("a: {b: 1, b: 2}", "line 1 sets 'b' a second time"),
        ('a: "\\0"', "line 1 has a null character"),
        ("a: " + "9" * 5000, "not YAML"),
        ("a: !!timestamp 2020-99-99", "not YAML"),
        ("#" * 2**21, "more than 1,048,576 characters"),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_yaml_has_limits(text, message):
    with at_once(), pytest.raises(InputError, match=message):
        read_yaml(text)


def test_aliases_within_the_limits_are_read():
    assert read_yaml("a: &a {b: 1e-3}\nc: [*a, *a]\nd: {<<: *a, e: 2}") == {
        "a": {"b": 0.001},
        "c": [{"b": 0.001}] * 2,
        "d": {"b": 0.001, "e": 2},
    }


def test_a_recipe_is_a_file(sret, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero", tmp_path / "gone", "{epochs: 3}"):
        assert sret("train", "--config", path, "--out", tmp_path / "out") == 2


def test_empty_values_are_refused(sret, train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for option in ("--out", "--data", "--init", "--model"):
        assert train(RECIPE, option, "") == train(RECIPE, f"{option}=") == 2
    assert sret("predict", "", "--checkpoint", "m.safetensors") == 2


@HALF
def test_altered_recipes(count, train):
    dice, text = random.Random(0), yaml.safe_dump(RECIPE).encode()
    for _ in range(count):
        train(altered(RECIPE, dice))
        train(damaged(text, dice))


WORDS = [
    *(str(value) for value in ODD if value != "\0"),
    *("9" * 5000, "null", "~", "-", "--", "=", "[", "{", "&a [*a]", "../..", "/dev/null", "/dev/zero", "x" * 5000),
    *("\udcff", "é", "%s", "'", "1e400", "nan:", "a:b=c", "*", "?"),
]


@HALF
def test_wrong_lines(count, sret, train, checkpoint, tmp_path, monkeypatch):
    dice = random.Random(0)
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    Image.new("RGB", (32, 32)).save("a.png")
    for i in range(50):
        path = Path("photos", str(i % 10), f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (5 * i, 0, 0)).save(path)
    # Compiling takes a minute.
    names = [
        field.name for config in (TrainConfig, RuntimeConfig) for field in fields(config) if field.name != "compile"
    ]
    load = ["--batch_size", "4", "--num_workers", "0"]
    lines = [
        ["info", "sret_t", "--img_size", "64"],
        ["info", str(checkpoint), "--img_size", "64"],
        ["predict", "a.png", "--checkpoint", str(checkpoint), "--top_k", "3", "--min_confidence", "0.5", *load],
        ["predict", "a.png", "--checkpoint", str(checkpoint), "--out", "table.csv", "--json"],
        ["features", "a.png", "--checkpoint", str(checkpoint), "--out", "table.jsonl", *load],
        ["eval", "--checkpoint", str(checkpoint), "--data", "photos", "--split", "test", "--max_corrupt", "1", *load],
        ["convert", str(checkpoint), "weights.pth", "--variant", "sret_t"],
        ["bench", str(checkpoint), "--batch_size", "1", "--rounds", "1", "--img_size", "64", "--dtype", "float32"],
        ["soft-labels", "--data", "photos", "--teacher", str(checkpoint), "--out", "labels", "--crops", "2", *load],
    ]
    for _ in range(count):
        line = list(dice.choice(lines))
        for _ in range(dice.choice((1, 1, 2))):
            place = dice.randrange(1, len(line))
            kind = dice.choice(("replace", "replace", "replace", "remove", "insert"))
            line[place : place + (kind != "insert")] = [] if kind == "remove" else [dice.choice(WORDS)]
        sret(*line)
        train(RECIPE, f"--{dice.choice(names)}", dice.choice(WORDS))


# Memory ---------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_in_memory_is_refused(sret, train, checkpoint, tmp_path, monkeypatch):
    wide = {"embed_dim": 65536, "num_heads": 1, "num_blocks": 100}
    assert train({**RECIPE, "model": {**RECIPE["model"], "stages": [wide]}}) == 2
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)
    line = ["predict", *paths, "--checkpoint", checkpoint]
    monkeypatch.setattr("sret.memory.total_memory", lambda: 10**6)
    assert sret(*line, "--batch_size", 10**9) == 0
    monkeypatch.setattr("sret.memory.total_memory", lambda: 10**5)
    assert sret(*line, "--batch_size", 10**9) == 2


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_gives_one_line(error, sret, checkpoint, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise error

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(SReT, "forward", fail)
    assert sret("predict", tmp_path / "a.png", "--checkpoint", checkpoint) == 2


# Images ---------------------------------------------------------------------------------------------------------------


def encoded_images() -> dict[str, bytes]:
    """One image in each format."""
    image, found = Image.effect_noise((40, 32), 60).convert("RGB"), {}
    kinds: dict[str, dict[str, Any]] = {
        **{name: {} for name in ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "DIB", "PPM", "TGA", "JPEG2000")},
        **{f"TIFF {name}": {"compression": name} for name in ("tiff_lzw", "tiff_deflate", "jpeg", "group4")},
        **({"AVIF": {}} if features.check("avif") else {}),
    }
    for name, options in kinds.items():
        file = io.BytesIO()
        (image.convert("1") if "group4" in name else image).save(file, name.split()[0], **options)
        found[name] = file.getvalue()
    return found


@COUNTS
def test_damaged_images(count, sret, checkpoint, tmp_path, capfd):
    dice = random.Random(0)
    for content in encoded_images().values():
        for start in range(0, count, 100):
            paths = [tmp_path / f"{i}.img" for i in range(start, min(count, start + 100))]
            for path in paths:
                path.write_bytes(damaged(content, dice))
            sret("predict", *paths, "--checkpoint", checkpoint, "--out", tmp_path / "table.jsonl")
            rows = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
            assert [row["image"] for row in rows] == [str(path) for path in paths]
            assert all(
                (row["prediction"] is None) == row["error"].startswith(row["image"]) for row in rows if row["error"]
            )


def test_any_error_of_a_decoder_names_the_image(sret, checkpoint, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise KeyError(5)

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    assert sret("predict", tmp_path / "a.png", "--checkpoint", checkpoint) == 1


def test_no_program_is_started_for_a_file(sret, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("started"))
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    assert sret("predict", tmp_path / "a.png", "--checkpoint", checkpoint) == 1


def make_shard(path: Path) -> None:
    """A WebDataset shard with two classes."""
    with tarfile.open(path, "w") as tar:
        for i, content in enumerate([*encoded_images().values()][:2] * 6):
            for suffix, part in (("png", content), ("cls", b"%d" % (i % 2))):
                member = tarfile.TarInfo(f"{i:03}.{suffix}")
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))


def make_table(path: Path) -> None:
    """A parquet file with two classes."""
    rows = {"image": [{"bytes": content} for content in encoded_images().values()][:2] * 6, "label": [0, 1] * 6}
    parquet.write_table(pyarrow.table(rows), path)


@pytest.mark.parametrize(("suffix", "make"), [(".tar", make_shard), (".parquet", make_table)])
@COUNTS
def test_damaged_data_files(count, suffix, make, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    dice, path, colour = (
        random.Random(0),
        tmp_path / f"x{suffix}",
        Preprocessing(img_size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1)),
    )
    make(path)
    content = path.read_bytes()
    for _ in range(count):
        path.write_bytes(damaged(content, dice))
        with at_once(), warnings.catch_warnings(), suppress(InputError):
            warnings.simplefilter("ignore")
            data = load_data(str(path))
            for samples in data.splits.values():
                dataset = ImageDataset(samples, colour)
                assert all(0 <= dataset[i][1] < len(data.class_names) or dataset[i][2] for i in range(len(dataset)))


def test_a_tar_file_of_negative_sizes_is_refused(tmp_path):
    make_shard(tmp_path / "x.tar")
    content = bytearray((tmp_path / "x.tar").read_bytes())
    content[124:136] = b"\xff" * 10 + b"\xfc\0"  # -1024 in base 256
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:512]))
    (tmp_path / "x.tar").write_bytes(content)
    with at_once(), pytest.raises(InputError, match="negative size"):
        load_data(str(tmp_path / "x.tar"))


# Exported files -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exports(checkpoint, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    for suffix in (".onnx", ".xml"):
        assert main(["export", str(checkpoint), str(folder / f"m{suffix}")]) == 0
    return {suffix: folder / f"m{suffix}" for suffix in (".onnx", ".xml", ".bin")}


@pytest.mark.slow
def test_damaged_exports(sret, exports, tmp_path):
    dice = random.Random(0)
    for kind in exports:
        for suffix, path in exports.items():
            (tmp_path / f"m{suffix}").write_bytes(path.read_bytes())
        path, content = tmp_path / f"m{kind}", exports[kind].read_bytes()
        for _ in range(1000):
            path.write_bytes(damaged(content, dice))
            assert (
                path.read_bytes() == content
                or sret("info", path.with_suffix(".onnx" if kind == ".onnx" else ".xml")) == 2
            )


@pytest.mark.slow
def test_exports_with_another_card(sret, exports, tmp_path):
    dice = random.Random(0)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "m.bin").write_bytes(exports[".bin"].read_bytes())
    import onnx

    for _ in range(200):
        model = onnx.load(exports[".onnx"])
        card = next(entry for entry in model.metadata_props if entry.key == "sret.card")
        card.value = json.dumps(altered(json.loads(card.value), dice))
        path = tmp_path / "m.onnx"
        path.write_bytes(model.SerializeToString())
        seal(path)
        codes = sret("info", path), sret("predict", tmp_path / "a.png", "--checkpoint", path)
        assert codes[0] == 2 or codes[1] in (0, 2)


# Soft labels ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    """Soft labels of the digits."""
    folder = tmp_path_factory.mktemp("labels")
    teacher = make_checkpoint(folder / "teacher.safetensors", small_config(in_chans=1))
    options = {"crops": 2, "top_k": 4, "batch_size": 256}
    list(write_soft_labels(folder / "out", "digits", Distillation(teacher=str(teacher)), **options))
    return folder / "out"


def use_labels(folder: Path) -> None:
    """Reads soft labels, as training does."""
    with at_once():
        dataset = SoftLabelDataset(folder, load_data("digits"), GREY)
        for index in (0, 999, 1221):
            image, target, errors = dataset[SampleIndex(index, 1)]
            assert errors or (image.isfinite().all() and abs(target.sum() - 1) < 1e-2 and (target >= 0).all())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_samples", 10**9),
        ("num_samples", 1221),
        ("crops", 0),
        ("crops", 3),
        ("crops", 1.5),
        ("top_k", 10**6),
        ("top_k", None),
        ("min_scale", float("nan")),
        ("seed", -1),
        ("shard_size", 0),
        ("shard_size", 1),
        ("distillation", {}),
        ("distillation", {"teacher": 5}),
        ("distillation", {"teacher": "x", "temperature": 0}),
        ("fingerprint", []),
        ("data", None),
        ("more", 1),
    ],
)
def test_manifests_that_are_refused(name, value, labels, tmp_path, train):
    shutil.copytree(labels, tmp_path / "labels")
    manifest = json.loads((labels / MANIFEST).read_text())
    (tmp_path / "labels" / MANIFEST).write_text(json.dumps({**manifest, name: value}))
    with pytest.raises(InputError):
        use_labels(tmp_path / "labels")
    assert train(RECIPE, "--label_smoothing", 0, "--soft_labels", tmp_path / "labels") == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda shard: shard["classes"].fill_(10),
        lambda shard: shard["classes"].fill_(-1),
        lambda shard: shard["crops"].fill_(-1),
        lambda shard: shard["probabilities"].fill_(float("nan")),
        lambda shard: shard["probabilities"].fill_(2),
        lambda shard: shard["flips"].fill_(2),
        lambda shard: shard.update(crops=shard["crops"].long()),
        lambda shard: shard.update(crops=shard["crops"][:5]),
        lambda shard: shard.update(more=shard["crops"].clone()),
        lambda shard: shard.pop("flips"),
    ],
)
def test_shards_that_are_refused(change, labels, tmp_path):
    shutil.copytree(labels, tmp_path / "labels")
    shard = load_file(shard_path(labels, 0))
    change(shard)
    write_weights(shard_path(tmp_path / "labels", 0), shard, {})
    with pytest.raises(InputError, match=r"damaged: labels-00000"):
        use_labels(tmp_path / "labels")


def test_a_crop_outside_its_image_is_an_error_of_the_image(labels, tmp_path):
    shutil.copytree(labels, tmp_path / "labels")
    shard = load_file(shard_path(labels, 0))
    shard["crops"][:] = 2**31 - 1
    write_weights(shard_path(tmp_path / "labels", 0), shard, {})
    dataset = SoftLabelDataset(tmp_path / "labels", load_data("digits"), GREY)
    assert "not inside it" in dataset[SampleIndex(0, 0)][2]


@COUNTS
def test_damaged_soft_labels(count, labels, tmp_path):
    dice, manifest = random.Random(0), json.loads((labels / MANIFEST).read_text())
    folder = tmp_path / "labels"
    shutil.copytree(labels, folder)
    for _ in range(count):
        name = dice.choice([MANIFEST, shard_path(labels, 0).name])
        content = (labels / name).read_bytes()
        for new in (
            damaged(content, dice),
            json.dumps(altered(manifest, dice)).encode() if name == MANIFEST else content,
        ):
            (folder / name).write_bytes(new)
            try:
                use_labels(folder)
            except InputError:
                continue
            assert new == content or name == MANIFEST
        (folder / name).write_bytes(content)


# Saved states ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(quick_report, tmp_path_factory) -> Path:
    """A run of one and a half epochs, with a moving average, and its recipe."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "batch_size": 256, "ema_decay": 0.9}))
    line = ["--config", str(folder / "recipe.yaml"), "--out", str(folder / "out"), "--max_steps", "6"]
    assert main(["train", *line]) == 0
    return folder


@pytest.fixture
def resume(sret, run, tmp_path):
    """Resumes the run from another state, given as bytes or values; returns the exit code."""
    out = tmp_path / "out"

    def resume(state: Any) -> int:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(run / "out", out)
        if isinstance(state, bytes):
            (out / STATE).write_bytes(state)
        else:
            save_state(out / STATE, state)
        return sret("train", "--config", run / "recipe.yaml", "--out", out, "--resume", "auto", "--max_steps", 7)

    return resume


def first(state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state of one weight."""
    return next(iter(state["optimizer"]["state"].values()))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(step=-3),
        lambda state: state.update(step=10**9),
        lambda state: state.update(step=1.5),
        lambda state: state.update(step=torch.tensor([1, 2])),
        lambda state: state.update(total_steps=3),
        lambda state: state.update(model=None),
        lambda state: state.update(model={}),
        lambda state: state.update(ema=None),
        lambda state: state.update(scaler={"scale": 1.0}),
        lambda state: state.update(optimizer={}),
        lambda state: state.update(optimizer=[]),
        lambda state: state["optimizer"].update(state={}),
        lambda state: state["optimizer"].update(param_groups=[]),
        lambda state: state["optimizer"]["param_groups"][0].update(betas=(2.0, 2.0)),
        lambda state: state["optimizer"]["param_groups"][0].update(eps=torch.ones(3)),
        lambda state: state["optimizer"]["param_groups"][0].pop("eps"),
        lambda state: state["optimizer"]["param_groups"][1].update(lr=[0.1]),
        lambda state: state["optimizer"]["param_groups"][1].pop("lr"),
        lambda state: first(state).pop("exp_avg"),
        lambda state: first(state).update(exp_avg=torch.zeros(1, 2, 3)),
        lambda state: first(state).update(exp_avg=torch.tensor(5.0)),
        lambda state: first(state).update(exp_avg=first(state)["exp_avg"].double()),
        lambda state: first(state)["exp_avg"].fill_(float("nan")),
        lambda state: state["model"].pop("head.bias"),
        lambda state: state["model"].update({"head.bias": torch.zeros(10, dtype=torch.int64)}),
        lambda state: state["model"].update({"head.bias": torch.zeros(11)}),
        lambda state: state["model"]["head.bias"].fill_(float("inf")),
        lambda state: state["ema"]["head.bias"].fill_(float("nan")),
        lambda state: state["sums"].update(loss=float("nan")),
        lambda state: state["sums"].pop("loss"),
        lambda state: state.update(rows=[]),
        lambda state: state["rows"][0].update(step=1),
        lambda state: state["rows"][0].pop("val_top1"),
        lambda state: state.update(best={}),
        lambda state: state.update(best=None),
        lambda state: state.update(best_predictions=None),
        lambda state: state["best_predictions"]["classes"].fill_(99),
        lambda state: state["best_predictions"].update(labels=torch.zeros(3)),
        lambda state: state["best_predictions"]["confidences"].fill_(-1),
        lambda state: state.update(unreadable=[1]),
        lambda state: state["config"].update(model=3),
        lambda state: state["config"].update(epochs=torch.ones(3)),
        lambda state: state["config"]["model"].update(memory=["pass"]),
        lambda state: state["config"]["model"]["stages"][0].update(embed_dim=torch.ones(3)),
        lambda state: state["sources"].update(data=torch.ones(3)),
        lambda state: state.pop("config"),
    ],
)
def test_states_that_are_refused(change, resume, run):
    state = load_state(run / "out" / STATE)
    change(state)
    if "rows" in state and state["rows"] == []:
        state["step"] = 9  # two epochs
    assert resume(state) == 2


@COUNTS
def test_damaged_states(count, resume, run):
    """A step or two are trained from a state with other values in places where another run may have them."""
    dice, content, state = random.Random(0), (run / "out" / STATE).read_bytes(), load_state(run / "out" / STATE)
    odd = (*ODD, torch.zeros(2), torch.ones(3, 4), torch.tensor(float("nan")), torch.tensor(5), (1, 2), b"x")
    assert resume(state) == 0
    for _ in range(count):
        resume(damaged(content, dice))
        resume(altered(state, dice, odd))
