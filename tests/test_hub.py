"""Models on the Hugging Face Hub: what is written can be read by sret and by timm. The hub is emulated."""

import json
import socket
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import small_config
from emulated_hub import Hub, emulated_hub
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from test_cli import make_checkpoint
from timm.data import resolve_data_config
from timm.models import save_for_hf

from sret import InputError, SReT
from sret.checkpoints.adapt import transfer_file
from sret.checkpoints.resolve import resolve
from sret.cli.main import main
from sret.models.config import ModelConfig
from sret.models.variants import CONFIGS, architecture_of, config_of

TRAINING = {
    "recipe": {"data": "/home/somebody/pets", "epochs": 3, "model": {}},
    "metrics": {"val_top1": 90.0, "epoch": 2},
    "val_images": 100,
    "versions": {"sret": "0.1.0"},
}


@pytest.fixture
def checkpoint(tmp_path):
    names = tuple(f"breed {k}" for k in range(10))
    return make_checkpoint(tmp_path / "m.safetensors", class_names=names, training=TRAINING)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    with emulated_hub() as hub:
        use_hub(monkeypatch, hub.address, tmp_path / "cache")
        yield hub


def use_hub(monkeypatch, address: str, cache: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", "hf_x")


@pytest.fixture
def sret(capsys):
    """Runs a command; gives (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_a_pushed_model_is_read_by_sret_and_by_timm(hub, checkpoint, sret, tmp_path):
    code, out, _ = sret("push", checkpoint, "me/pets", "--license", "cc-by-4.0", "--private", "true")
    assert code == 0
    assert out.startswith(f"{hub.address}/me/pets/commit/")
    assert hub.repos["me/pets"].keys() == {"model.safetensors", "config.json", "README.md"}
    assert hub.private == {"me/pets"}

    source = "hf-hub:me/pets"
    ours, card = resolve(checkpoint)
    x = torch.randn(2, 3, 64, 64)
    model, found = resolve(source)
    assert found.class_names == card.class_names
    assert found.preprocessing == card.preprocessing
    created = timm.create_model(source, pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model(x), ours(x))
        assert torch.equal(created(x), ours(x))
    assert tuple(resolve_data_config({}, model=created)["mean"]) == card.preprocessing.mean
    assert created.pretrained_cfg["label_names"] == list(card.class_names)
    resized = timm.create_model(source, pretrained=True, img_size=96, num_classes=3, in_chans=1)
    assert (resized.config.img_size, resized.num_classes, resized.in_chans) == ((96, 96), 3, 1)

    Image.new("RGB", (70, 70)).save(tmp_path / "a.png")
    assert sret("predict", tmp_path / "a.png", "--checkpoint", source)[0] == 0
    assert sret("predict", tmp_path / "a.png", "--checkpoint", f"{source}@main")[0] == 0


def test_training_starts_from_a_model_of_the_hub(hub, checkpoint, sret, tmp_path):
    sret("push", checkpoint, "me/pets")
    model = SReT(small_config(num_classes=3))
    assert "new classifier: 3 classes instead of 10" in transfer_file(model, "hf-hub:me/pets")
    expected = load_file(checkpoint)
    assert all(torch.equal(model.state_dict()[key], expected[key]) for key in expected if not key.startswith("head"))
    options = ["--data", "digits", "--init", "hf-hub:me/pets", "--epochs", "1", "--batch_size", "256"]
    recipe = {"model": json.loads(json.dumps(small_config(num_classes=10, in_chans=1).to_dict()))}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, out, _ = sret(
        "train", "--config", tmp_path / "recipe.yaml", *options, "--max_steps", "1", "--out", tmp_path / "run"
    )
    assert code == 0
    assert "Init    first convolution adapted from 3 channels to 1" in out


def test_training_starts_from_a_model_that_timm_uploaded(hub, tmp_path):
    uploaded = timm.create_model("sret_t", img_size=64)
    save_for_hf(uploaded, tmp_path / "repo", safe_serialization=True)
    hub.repos["me/timm"] = {path.name: path.read_bytes() for path in (tmp_path / "repo").iterdir()}
    model = timm.create_model("sret_t", img_size=96, num_classes=2)
    transfer_file(model, "hf-hub:me/timm")
    name = "stages.1.recursions.0.block.mlp.branch.fc1.weight"
    assert torch.equal(model.state_dict()[name], uploaded.state_dict()[name])
    with pytest.raises(InputError, match="without the metadata"):
        resolve("hf-hub:me/timm")


def test_the_model_card_says_how_to_load_it_what_it_reaches_and_its_licence(checkpoint, sret, tmp_path):
    assert sret("push", checkpoint, "me/pets", "--out", tmp_path / "repo")[0] == 0
    text = (tmp_path / "repo" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert (metadata["library_name"], metadata["license"]) == ("timm", "other")
    result = metadata["model-index"][0]["results"][0]
    assert result["metrics"][0]["value"] == 90.0
    assert result["dataset"]["name"] == "pets"
    assert "import sret, timm" in body
    assert "pip install -e" in body  # the package is not on PyPI
    assert 'timm.create_model("hf-hub:me/pets", pretrained=True)' in body
    assert "| pets | val | 100 | 90.00 | 82.6 to 94.5 | epoch 2, chosen by this accuracy |" in body
    assert "Weights: not stated" in body
    assert "/home/somebody" not in text + str(resolve(tmp_path / "repo" / "model.safetensors")[1])
    local = timm.create_model(f"local-dir:{tmp_path / 'repo'}", pretrained=True).eval()
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(local(x), resolve(checkpoint)[0](x))


def test_results_of_eval_replace_the_validation_accuracy(checkpoint, sret, tmp_path):
    for split, count in (("test", 200), ("all", 1000)):
        measured = {
            "checkpoint": "m",
            "data": "a|b\n*c*",
            "split": split,
            "top1": 80.5,
            "top5": 99,
            "loss": 1,
            "count": count,
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(measured))
    results = ["--results", tmp_path / "test.json", tmp_path / "all.json"]
    assert sret("push", checkpoint, "me/pets", *results, "--out", tmp_path / "repo")[0] == 0
    text = (tmp_path / "repo" / "README.md").read_text()
    assert r"| a\|b\\n\*c\* | test | 200 | 80.50 | 74.5 to 85.4 |  |" in text
    assert r"| all | 1,000 | 80.50 | 77.9 to 82.8 |  |" in text
    assert "90.00" not in text
    code, _, err = sret("push", checkpoint, "me/pets", "--results", tmp_path / "gone.json")
    assert code == 2
    assert err.startswith(f"sret: error: {tmp_path}/gone.json: no such file; --results takes files with the output of ")
    (tmp_path / "test.json").write_text("[]")
    code, _, err = sret("push", checkpoint, "me/pets", *results, "--out", tmp_path / "again")
    assert code == 2
    assert "test.json: not the output of sret eval --json" in err


def test_what_the_hub_refuses_is_one_line(hub, checkpoint, sret):
    hub.repos["me/empty"] = {}
    for source, message in (
        ("hf-hub:me/nothing", "Repository Not Found"),
        ("hf-hub:me/empty", "the repository has no model.safetensors"),
        ("hf-hub:me/empty@v9", "Revision Not Found"),
        ("hf-hub:a/b/c", "Repo id must be"),
        ("hf-hub:", "hf-hub:"),
    ):
        code, _, err = sret("info", source)
        assert code == 2, source
        assert message in err
        assert err.count("\n") == 1
    hub.is_open = False
    code, _, err = sret("push", checkpoint, "me/pets")
    assert code == 2
    assert "hf auth login" in err
    assert err.count("\n") == 1
    for name in ("pets", "me/pets/x", "me/p ts", "https://huggingface.co/me/pets"):
        assert "write owner/name" in sret("push", checkpoint, name)[2]


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        use_hub(monkeypatch, f"http://127.0.0.1:{taken.getsockname()[1]}", tmp_path / "cache")
        yield


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["info", "hf-hub:me/pets"], "hf-hub:me/pets: no connection to 127.0.0.1; give the path of a weights file"),
        (["push", "CHECKPOINT", "me/pets"], "me/pets: no connection to 127.0.0.1; --out FOLDER writes the files"),
        (
            ["train", "--model", "sret_t", "--data", "hf:me/pets", "--out", "x"],
            "hf:me/pets: no connection to 127.0.0.1; give a folder with the parquet files",
        ),
        (
            ["soft-labels", "--data", "digits", "--teacher", "hf-hub:me/pets", "--out", "x"],
            "could not load the teacher hf-hub:me/pets: no connection to 127.0.0.1; teacher_weights",
        ),
    ],
)
@pytest.mark.usefixtures("no_hub")
def test_without_a_network_one_line_comes_soon(arguments, advice, checkpoint, sret, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    code, out, err = sret(*(checkpoint if argument == "CHECKPOINT" else argument for argument in arguments))
    assert time.monotonic() - started < 15  # the hub's client would wait for 23 s between its tries
    assert (code, out) == (2, "")
    assert err.startswith(f"sret: error: {advice}")
    assert err.count("\n") == 1
    assert not constants.HF_HUB_OFFLINE


def test_without_a_network_a_downloaded_model_is_read_from_the_cache(hub, checkpoint, sret, monkeypatch):
    assert sret("push", checkpoint, "me/pets")[0] == 0
    assert sret("info", "hf-hub:me/pets")[0] == 0
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert sret("info", "hf-hub:me/pets")[0] == 0


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_architecture_of_a_named_model_is_its_name(name):
    assert architecture_of(CONFIGS[name]) == (name, {})


def test_any_model_has_an_architecture():
    for config in (
        small_config(img_size=(48, 64), permutation="strided", residual_scale="passes", reversible=True),
        config_of("sret_s").with_changes({"stem_stride": 4, "global_pool": "max"}),
    ):
        name, changes = architecture_of(config)
        json.dumps(changes)
        assert config_of(name).with_changes(changes) == config.with_changes({"num_classes": 1000})
        model = timm.create_model(name, **json.loads(json.dumps(changes)), device="meta")
        assert isinstance(model.config, ModelConfig)
        assert model.config == config.with_changes({"num_classes": 1000})


def test_files_of_a_user_are_not_overwritten(checkpoint, sret, tmp_path):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "README.md").write_text("mine")
    code, _, err = sret("push", checkpoint, "me/pets", "--out", tmp_path / "repo")
    assert code == 2
    assert "not an empty folder" in err
    with pytest.raises(InputError, match="no such file"):
        resolve(tmp_path / "gone.safetensors")
