import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sret
from sret import InputError, SReT
from sret.checkpoints.card import METADATA_KEY, Card, load_weights, save_weights
from sret.checkpoints.state import load_state, save_state
from sret.data.preprocess import Preprocessing
from sret.files import write_atomically


def card(config) -> Card:
    preprocessing = Preprocessing(img_size=config.input_size, mean=(0.5,) * 3, std=(0.2,) * 3)
    return Card(config=config, preprocessing=preprocessing, class_names=tuple("abcdefghij"), training={"step": 3})


@pytest.fixture
def file(tmp_path, model):
    save_weights(tmp_path / "model.safetensors", model.state_dict(), card(model.config))
    return tmp_path / "model.safetensors"


def test_a_weights_file_rebuilds_the_model(file, model, image):
    loaded, read = load_weights(file)
    assert read == card(model.config)
    assert read.name_of(2) == "c"
    assert not loaded.training
    assert torch.equal(loaded(image), model(image))
    assert torch.equal(sret.load(file)(image), model(image))


def test_each_tensor_is_stored_once(file, model):
    tensors = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == 8 + header + tensors


def test_timm_reads_it(tmp_path):
    import timm

    model = timm.create_model("sret_t", num_classes=10)
    save_weights(tmp_path / "t.safetensors", model.state_dict(), card(model.config))
    again = timm.create_model("sret_t", num_classes=10, checkpoint_path=str(tmp_path / "t.safetensors"))
    assert torch.equal(again.head.weight, model.head.weight)


def test_files_that_are_not_ours_are_refused(file, tmp_path, model):
    content = file.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save({}, tmp_path / "pickle.pth")
    for name in ("cut.safetensors", "text.safetensors", "empty.safetensors"):
        with pytest.raises(InputError, match=f"{name}: not a safetensors file, or a truncated one"):
            load_weights(tmp_path / name)
    with pytest.raises(InputError, match="sret convert"):
        load_weights(tmp_path / "pickle.pth")
    with pytest.raises(InputError, match="no such file"):
        load_weights(tmp_path / "gone.safetensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"run: a folder, not a file; did you mean .*best.safetensors"):
        load_weights(tmp_path / "run")
    spoilt = {**model.state_dict(), "head.bias": torch.full((10,), float("nan"))}
    save_weights(tmp_path / "nan.safetensors", spoilt, card(model.config))
    with pytest.raises(InputError, match=r"not finite in head.bias"):
        load_weights(tmp_path / "nan.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(InputError, match="without the metadata"):
        load_weights(tmp_path / "foreign.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors", {METADATA_KEY: card(model.config).to_json()})
    with pytest.raises(InputError, match=r"other.safetensors: these weights do not fit.*missing stem.conv1.weight"):
        load_weights(tmp_path / "other.safetensors")
    values = json.loads(card(model.config).to_json())
    odd = {**values, "preprocessing": {**values["preprocessing"], "interpolation": "magic"}}
    short = {**values, "class_names": ["a"]}
    for metadata in (
        "{}",
        "[]",
        "not json",
        json.dumps(odd),
        json.dumps(short),
        json.dumps({**json.loads(card(model.config).to_json()), "config": {"x": 1}}),
    ):
        save_file(model.state_dict(), tmp_path / "odd.safetensors", {METADATA_KEY: metadata})
        with pytest.raises(InputError):
            load_weights(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "written in format 1 by an older version of sret; this version reads format 2: train or convert again"),
        ({"format": 1}, "format 1 by an older version"),
        ({"format": 3}, "written in format 3 by a newer version of sret; this version reads format 2: update sret"),
        ({"format": "two"}, "its metadata cannot be read by this version of sret"),
    ],
)
def test_a_file_of_another_format_is_one_line(change, message, tmp_path, model):
    values = json.loads(card(model.config).to_json())
    assert values.pop("format") == 2
    path = tmp_path / "old.safetensors"
    save_file(model.state_dict(), path, {METADATA_KEY: json.dumps({**values, **change})})
    with pytest.raises(InputError, match=rf"^{path}: .*{message}") as error:
        load_weights(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("where", "name"), [(os, "fsync"), (Path, "replace")])
def test_a_save_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, where, name):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(where, name, full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_replaced_file_keeps_its_links_and_permissions(tmp_path):
    (tmp_path / "file").touch(mode=0o600)
    (tmp_path / "link").symlink_to("file")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_a_state_comes_back(tmp_path):
    state = {"step": 3, "tensors": {"a": torch.arange(3)}, "best": None}
    save_state(tmp_path / "state.pt", state)
    loaded = load_state(tmp_path / "state.pt")
    assert loaded["step"] == 3
    assert torch.equal(loaded["tensors"]["a"], torch.arange(3))


def test_a_configured_model_survives_a_reset_classifier(tmp_path, model, image):
    model.reset_classifier(3)
    with pytest.raises(InputError, match="10 class names for 3 classes"):
        card(model.config)
    names = replace(card(replace(model.config, num_classes=10)), config=model.config, class_names=())
    save_weights(tmp_path / "m.safetensors", model.state_dict(), names)
    assert isinstance(sret.load(tmp_path / "m.safetensors"), SReT)
    assert torch.equal(sret.load(tmp_path / "m.safetensors")(image), model(image))


def flipped(path, tmp_path, position):
    """A copy of a file in which one bit differs."""
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    copy = tmp_path / f"flipped{path.suffix}"
    copy.write_bytes(content)
    return copy


def test_a_flipped_bit_anywhere_is_noticed(tmp_path, model):
    """In a state, in weights; the bytes of a zip archive that mean nothing, such as its times, may flip unseen."""
    state = {"step": 3, "model": model.state_dict(), "rows": [{"epoch": 1, "val_top1": 50.0}]}
    save_state(tmp_path / "state.pt", state)
    weights = tmp_path / "m.safetensors"
    save_weights(weights, model.state_dict(), card(model.config))
    for path, load in ((tmp_path / "state.pt", load_state), (weights, load_weights)):
        size, unseen = path.stat().st_size, 0
        for position in torch.linspace(8, size - 1, 60).long().tolist():
            try:
                found = load(flipped(path, tmp_path, position))
            except InputError:
                continue
            unseen += 1
            tensors = found["model"] if path.suffix == ".pt" else found[0].state_dict()
            assert all(torch.equal(tensors[key], value) for key, value in model.state_dict().items())
        assert unseen <= 3, path


def test_a_state_of_another_format_is_refused(tmp_path):
    for content in ({"step": 3, "model": {}}, {"format": 1, "content": torch.zeros(3, dtype=torch.uint8)}):
        torch.save(content, tmp_path / "state.pt")
        with pytest.raises(InputError, match=r"state\.pt: not a state .*format 2"):
            load_state(tmp_path / "state.pt")
