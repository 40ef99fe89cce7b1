"""The authors' files, made here from the recorded key lists: read safely, checked, converted and back."""

import argparse
import json
import os
import warnings
from pathlib import Path

import pytest
import reference
import timm
import torch
from conftest import DATA, small_config
from safetensors.torch import save_file
from test_variants import NAMES

import sret
from sret import InputError, SReT
from sret.checkpoints import official as weights
from sret.checkpoints.download import drive_url
from sret.checkpoints.fit import load_pretrained
from sret.checkpoints.resolve import resolve
from sret.errors import InputWarning
from sret.layers import replay
from sret.models.variants import RELEASES, config_of

OFFICIAL = json.loads((DATA / "official_variants.json").read_text())


def official_state_dict(name: str) -> dict[str, torch.Tensor]:
    """Random values under the recorded keys and shapes; a shared block's tensor under each of its positions."""
    state = {}
    for key, shape in OFFICIAL[name]["state_dict"].items():
        is_counter = key.endswith("num_batches_tracked")
        state[key] = torch.tensor(7) if is_counter else torch.randn(shape) * 0.1
        if key.endswith(("running_var", "coefficient1.bias", "norm1.weight")):
            state[key] = state[key].abs() + 0.5
    for key in state:
        parts = key.split(".")
        if parts[0] == "transformers" and int(parts[3]) % 4 == 2:  # the second pass of a block
            parts[3] = str(int(parts[3]) - 2)
            state[key] = state[".".join(parts)]
    return state


@pytest.fixture(scope="module")
def official_t() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return official_state_dict("SReT_T")


@pytest.fixture
def file_t(official_t, tmp_path) -> Path:
    path = tmp_path / "SReT_T.pth"
    torch.save({"model": official_t, "args": argparse.Namespace(model="SReT_T", lr=1e-3)}, path)
    return path


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_key_of_every_architecture_converts_and_back(name):
    config = config_of(NAMES[name])
    official = official_state_dict(name)
    ours = weights.from_official(official, config)
    SReT(config).load_state_dict(ours)
    back = weights.to_official(ours, config)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], official[key]) for key in official)


def test_ours_to_official_to_ours_is_exact(config):
    state = SReT(config).state_dict()
    back = weights.from_official(weights.to_official(state, config), config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["SReT_T", "SReT_T_wo_slice"])
def test_converted_weights_give_the_outputs_of_the_formula_on_the_authors_keys(name):
    config = config_of(NAMES[name])
    official = official_state_dict(name)
    model = SReT(config).eval()
    model.load_state_dict(weights.from_official(official, config))
    groups = list(zip(OFFICIAL[name]["groups"]["first"], OFFICIAL[name]["groups"]["second"], strict=True))
    permutations = [torch.randperm(784) for _ in range(2)] if groups[0][1] > 1 else []
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad(), replay(permutations):
        expected = reference.official_forward(official, x, (4, 10, 6), (2, 4, 8), groups, permutations)
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


def test_shared_positions_must_agree(official_t):
    altered = dict(official_t)
    altered["transformers.1.blocks.2.mlp.fc1.bias"] = altered["transformers.1.blocks.2.mlp.fc1.bias"] + 1
    with pytest.raises(InputError, match=r"transformers.1.blocks.0.mlp.fc1.bias and transformers.1.blocks.2.mlp"):
        weights.from_official(altered, config_of("sret_t"))


def test_a_mismatch_names_keys_and_the_likeliest_variant(official_t):
    with pytest.raises(InputError, match=r"fc1.weight is \(230, 64\), not \(256, 64\).*fits sret_t or sret_t_unsliced"):
        weights.from_official(official_t, config_of("sret_lt"))
    damaged = {key: value for key, value in official_t.items() if key != "norm.bias"}
    with pytest.raises(InputError, match=r"missing norm.bias\. The most similar variant is sret_t"):
        weights.from_official(damaged, config_of("sret_t"))
    with pytest.raises(InputError, match="fits no published SReT"):
        weights.from_official({"conv1.weight": torch.zeros(1)}, config_of("sret_t"))


def test_load_official_reads_a_file(file_t, official_t):
    model = sret.load_official(file_t)
    assert model.config == config_of("sret_t")
    assert not model.training
    assert torch.equal(model.head.weight, official_t["head.weight"])


def test_a_plain_state_dict_and_other_classes_are_read_too(official_t, tmp_path):
    state = {**official_t, "head.weight": torch.zeros(5, 256), "head.bias": torch.zeros(5)}
    torch.save(state, tmp_path / "SReT_T_pets.pth")
    assert sret.load_official(tmp_path / "SReT_T_pets.pth").num_classes == 5


def test_two_published_lts_share_a_name():
    state = official_state_dict("SReT_LT")
    for hint in ("SReT_LT.pth", "sret_finetuned.pth", "my_sret_model.pth"):
        with pytest.warns(InputWarning, match="as sret_lt, .* sret_lt_16_14_1 and"):
            assert weights.identify(state, hint) == "sret_lt"
    assert weights.identify(state, "SReT_LT_Distill.pth") == "sret_lt"


@pytest.mark.parametrize(
    ("hint", "variant"),
    [
        ("SReT_T_Distill.pth", "sret_t"),
        ("SReT_T_wo_slice.pth", "sret_t_unsliced"),
        ("SReT_T_wo_slice_Distill.pth", "sret_t_unsliced"),
        ("sret_t_unsliced.pth", "sret_t_unsliced"),
    ],
)
def test_the_name_tells_sliced_from_unsliced(official_t, hint, variant):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert weights.identify(official_t, hint) == variant


def test_an_unnamed_variant_is_guessed_with_a_warning(official_t):
    with pytest.warns(UserWarning, match="as sret_t, .* sret_t_unsliced"):
        assert weights.identify(official_t, "checkpoint.pth") == "sret_t"


def test_shapes_tell_the_other_variants():
    assert weights.identify(official_state_dict("SReT_LT_16-14-1_1-1-1"), "SReT_LT_16-14-1.pth") == "sret_lt_16_14_1"
    assert weights.identify(official_state_dict("SReT_S_wo_slice_512"), "x.pth") == "sret_s_unsliced_512"
    with pytest.raises(InputError, match="fits no published SReT"):
        weights.identify({"a": torch.zeros(1)}, "SReT_T.pth")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("use_zip", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, use_zip):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "args": Evil()}, "evil.pth", _use_new_zipfile_serialization=use_zip)
    with pytest.raises(InputError, match=r"evil.pth.*(refused, it holds \S*system|run code)"):
        weights.read_official("evil.pth")
    assert not Path("evil").exists()


def test_files_that_are_no_checkpoints_are_refused(file_t, tmp_path):
    content = file_t.read_bytes()
    for name, data in (
        ("cut.pth", content[: len(content) // 2]),
        ("text.pth", b"<html>quota</html>"),
        ("empty.pth", b""),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            weights.read_official(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": {"a": 3}}, tmp_path / "numbers.pth")
    with pytest.raises(InputError, match="contains a list"):
        weights.read_official(tmp_path / "list.pth")
    with pytest.raises(InputError, match="no state dict under 'model'"):
        weights.read_official(tmp_path / "numbers.pth")
    with pytest.raises(InputError, match="no such file"):
        weights.read_official(tmp_path / "none.pth")


def test_pretrained_from_a_file_adapts_classes_channels_and_size(file_t, official_t):
    def create(**options: object) -> SReT:
        return timm.create_model("sret_t", pretrained=True, pretrained_cfg_overlay={"file": str(file_t)}, **options)

    assert torch.equal(create().head.weight, official_t["head.weight"])
    grey = create(in_chans=1, num_classes=4, img_size=96)
    torch.testing.assert_close(grey.stem.conv1.weight, official_t["patch_embed.conv1.weight"].sum(1, keepdim=True))
    assert grey.head.weight.shape == (4, 256)
    assert grey.pos_embed.weight.shape[-2:] == (12, 12)
    block = "transformers.1.blocks.4.attn.qkv.weight"
    assert torch.equal(grey.stages[1].recursions[1].block.attn.branch.qkv.weight, official_t[block])
    backbone = create(features_only=True)
    assert torch.equal(backbone.model.stages[1].recursions[1].block.attn.branch.qkv.weight, official_t[block])
    with pytest.raises(InputError, match=r"SReT_T.pth: the weights of stage 1 are for 2 block.*this model has 1"):
        create(stages=small_config(img_size=224).stages)


def test_pretrained_from_our_own_file(tmp_path):
    state = timm.create_model("sret_t").state_dict()
    save_file(state, tmp_path / "ours.safetensors")
    overlay = {"file": str(tmp_path / "ours.safetensors")}
    model = timm.create_model("sret_t", pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))


@pytest.fixture
def drive(monkeypatch, tmp_path):
    """gdown replaced by a list of what it was asked for and the bytes it brings; the cache is a fresh folder."""
    import gdown

    asked: list[str] = []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def serve(content: bytes) -> list[str]:
        def download(url: str, output: str, quiet: bool) -> str:
            asked.append(url)
            Path(output).write_bytes(content)
            return output

        monkeypatch.setattr(gdown, "download", download)
        return asked

    return serve


def test_pretrained_fetches_from_drive_once(drive, file_t, official_t, tmp_path):
    asked = drive(file_t.read_bytes())
    for _ in range(2):
        model = timm.create_model("sret_t.dist_in1k", pretrained=True)
        assert torch.equal(model.head.bias, official_t["head.bias"])
    assert asked == [f"https://drive.google.com/uc?id={RELEASES['sret_t.dist_in1k'].drive_id}"]
    assert [p.name for p in (tmp_path / "hub/checkpoints/sret").iterdir()] == ["sret_t.dist_in1k.pth"]


def test_a_failed_download_says_what_to_do_and_leaves_nothing(drive, tmp_path):
    drive(b"<html>Quota exceeded</html>")
    with pytest.raises(InputError, match=r"could not download sret_t.in1k: .*; download https://drive.* in a browser"):
        timm.create_model("sret_t", pretrained=True)
    assert not list((tmp_path / "hub/checkpoints/sret").iterdir())


def test_a_download_without_a_connection_names_the_host_and_no_more(drive, monkeypatch, tmp_path):
    import gdown
    import requests

    def download(**_: object) -> None:
        requests.get("http://127.0.0.1:1")  # nobody listens

    drive(b"")
    monkeypatch.setattr(gdown, "download", download)
    with pytest.raises(InputError) as error:
        resolve("sret_t")
    url, path = drive_url(RELEASES["sret_t.in1k"].drive_id), tmp_path / "hub/checkpoints/sret/sret_t.in1k.pth"
    assert str(error.value) == (
        f"could not download sret_t.in1k: no connection to drive.google.com; download {url} in a browser, and give the "
        f"file's path instead of the name, or move it to {path}"
    )


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_weights_go_over_to_other_channels(before, after):
    """What grey weights answer to an image, they answer to its three equal channels, and the other way round."""
    source, target = (SReT(small_config(in_chans=channels)).eval() for channels in (before, after))
    load_pretrained(target, source.state_dict())
    grey = torch.randn(2, 1, 64, 64)
    answers = [model(grey.expand(-1, channels, -1, -1)) for model, channels in ((source, before), (target, after))]
    torch.testing.assert_close(answers[1], answers[0], atol=1e-5, rtol=1e-5)
