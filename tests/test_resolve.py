"""One way from a name or path to a model: which files and names are read, and what the others are refused with."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_cli import make_checkpoint
from test_weights import official_state_dict

from sret import InputError, SReT
from sret.checkpoints import download
from sret.checkpoints.adapt import transfer_file
from sret.checkpoints.card import load_weights
from sret.checkpoints.official.convert import convert
from sret.checkpoints.resolve import is_name, resolve
from sret.cli.tables import print_model
from sret.export.runtime import load_model
from sret.models.variants import RELEASES, config_of


@pytest.fixture(scope="module")
def official_file(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("official") / "SReT_T.pth"
    torch.save({"model": official_state_dict("SReT_T")}, path)
    return path


@pytest.fixture
def fetched(monkeypatch, official_file) -> list[str]:
    """The addresses that were fetched; each brings the same file."""
    asked: list[str] = []

    def fetch(url: str) -> Path:
        asked.append(url)
        return official_file

    monkeypatch.setattr(download, "fetch", fetch)
    return asked


def url_of(name: str) -> str:
    return download.drive_url(RELEASES[name].drive_id)


@pytest.mark.parametrize(("name", "release"), [("sret_t", "sret_t.in1k"), ("sret_t.dist_in1k", "sret_t.dist_in1k")])
@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("load", [resolve, load_model])
def test_a_published_name_is_fetched(name, release, kind, load, fetched):
    model, card = load(kind(name))
    assert fetched == [url_of(release)]
    assert model.config == card.config == config_of("sret_t")
    assert not model.training
    assert card.training == {"converted_from": name}


def test_the_name_says_which_of_two_models_of_one_shape_it_is(fetched):
    assert resolve("sret_t_unsliced.in1k")[1].config == config_of("sret_t_unsliced")
    with pytest.raises(InputError, match="leave --variant out"):
        resolve("sret_t", "sret_t_unsliced")


def test_files_of_the_authors_and_ours_are_distinguished_by_their_content(official_file, tmp_path):
    assert resolve(official_file)[1].config == config_of("sret_t")
    assert resolve(official_file, "sret_t_unsliced")[1].config == config_of("sret_t_unsliced")
    ours = make_checkpoint(tmp_path / "ours.safetensors")
    (tmp_path / "ours").write_bytes(ours.read_bytes())
    for path in (ours, tmp_path / "ours"):
        assert resolve(path)[1] == load_weights(ours)[1]
        with pytest.raises(InputError, match="only for the authors' files"):
            resolve(path, "sret_t")


def test_an_existing_file_wins_over_a_name(fetched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = make_checkpoint(tmp_path / "ours.safetensors").rename("sret_t")
    assert resolve("sret_t")[1] == load_weights(ours)[1]
    assert not fetched


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone.safetensors", r"^gone.safetensors: no such file$"),
        ("gone.bin", r"^gone.bin: no such file$"),
        ("runs/sret_t", r"^runs/sret_t: no such file"),
        ("sret_t.pth", r"^sret_t.pth: no such file"),
        ("sret_tt", r"unknown model 'sret_tt'.*did you mean 'sret_t'"),
        ("sret_tt.in1k", r"unknown model 'sret_tt.in1k'.*did you mean 'sret_t'"),
        ("sret_t.dist_in1", r"sret_t has no weights tagged 'dist_in1'; did you mean 'dist_in1k'"),
        ("sret_deep_108", r"sret_deep_108 has no published weights; train it"),
    ],
)
def test_anything_else_is_refused(source, message, fetched):
    for kind in (str, Path):
        with pytest.raises(InputError, match=message):
            resolve(kind(source))
        with pytest.raises(InputError, match=message):
            transfer_file(SReT(config_of("sret_t")), kind(source))
    assert not fetched


def test_published_weights_begin_a_training(fetched):
    model = SReT(config_of("sret_t_unsliced"))
    transfer_file(model, Path("sret_t_unsliced.dist_in1k"))
    assert fetched == [url_of("sret_t_unsliced.dist_in1k")]
    assert torch.equal(model.head.weight, resolve("sret_t")[0].head.weight)


def test_a_description_downloads_nothing(fetched):
    console = Console(record=True, width=120)
    print_model(console, "sret_t.dist_in1k", None)
    assert "sret_t.dist_in1k: 77.6 % top-1" in console.export_text()
    assert not fetched
    assert is_name("sret_t.dist_in1k")


def test_a_published_name_is_converted(fetched, tmp_path):
    assert "1000 classes" in convert("sret_t.dist_in1k", tmp_path / "t.safetensors")
    assert load_weights(tmp_path / "t.safetensors")[1].training == {"converted_from": "sret_t.dist_in1k"}
