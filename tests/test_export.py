"""A model in a file for another engine answers as it did, each weight is there once, and a failure leaves nothing."""

import copy
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import processes
import pytest
import torch
from conftest import small_config
from PIL import Image
from test_cli import DIGITS, ROOT, make_checkpoint, one_line, sret  # noqa: F401 (a fixture)
from test_data import make_folder
from test_weights import official_state_dict

import sret as package
from sret import InputError, SReT, StageConfig
from sret.checkpoints.card import Card, load_weights, save_weights
from sret.checkpoints.files import checksum
from sret.cli import main as cli
from sret.data.preprocess import Preprocessing
from sret.export import export as exporting
from sret.export.export import export, export_model
from sret.export.onnx import to_onnx
from sret.export.quantize import quantized
from sret.export.runtime import Exported, load_exported, load_model, seal
from sret.export.verify import Comparison, compare
from sret.inference.predict import predict

SUFFIXES = (".onnx", ".xml")
ODD_NAMES = ("<&\"'>", "dog\n", "ключ", "", *"abcdef")


def tiny_config(**changes):
    """Two stages for 64-pixel images: (8, 8) tokens in 8 and 2 slices, then (4, 4) in 3 and 3."""
    stages = tuple(
        StageConfig(embed_dim=dim, num_heads=2, num_blocks=1, groups=groups, mlp_ratio=2.0)
        for dim, groups in ((16, (8, 2)), (32, (3, 3)))
    )
    return small_config(**{"stages": stages, **changes})


def one_stage(**changes):
    """Half of it, traced in half the time."""
    return tiny_config(**{"stages": tiny_config().stages[:1], **changes})


def disturbed(config) -> SReT:
    """A model in which no part does nothing: coefficients, biases and statistics are off their first values."""
    model = SReT(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.randn(tensor.shape) if "var" not in name else torch.rand(tensor.shape)
    return model


def card_of(model: SReT, **changes) -> Card:
    config = model.config
    preprocessing = Preprocessing(
        img_size=config.input_size, mean=(0.5,) * config.in_chans, std=(0.2,) * config.in_chans
    )
    return Card(config=config, preprocessing=preprocessing, **changes)


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture(scope="module", autouse=True)
def _traced_once():
    """To trace a model takes seconds, so what was traced before is taken from here."""
    known: dict[object, onnx.ModelProto] = {}

    def remembered(model: SReT, image: tuple[int, int, int], policy: None = None) -> onnx.ModelProto:
        key = checksum(model.state_dict()), model.config, image
        if key not in known:
            known[key] = to_onnx(model, image)
        proto = onnx.ModelProto()
        proto.CopyFrom(known[key])
        return proto

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "to_onnx", remembered)
        yield


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    """The tiny model as a weights file, and exported from it to both engines."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exports")
    model = disturbed(tiny_config())
    files = {suffix: folder / f"m{suffix}" for suffix in (".safetensors", *SUFFIXES)}
    save_weights(files[".safetensors"], model.state_dict(), card_of(model, class_names=ODD_NAMES, training={"step": 3}))
    for suffix in SUFFIXES:
        export(str(files[".safetensors"]), files[suffix])
    return files


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Weights that have learnt a little."""
    out = tmp_path_factory.mktemp("digits") / "run"
    assert cli.main(["train", "--config", DIGITS, "--out", str(out), "--epochs=2", "--warmup_epochs=0"]) == 0
    return out / "best.safetensors"


THREE_PASSES = StageConfig(embed_dim=16, num_heads=2, num_blocks=1, groups=(4, 3, 2), projection_ratio=None)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (tiny_config(), (80, 56)),
        (one_stage(permutation="strided"), 72),  # 81 tokens: slices differ in length
        (one_stage(learnable_residual=False, in_chans=1), (41, 53)),
        (tiny_config(stages=(THREE_PASSES,), stem_stride=4, img_size=(20, 12)), None),
        (one_stage(num_classes=0, global_pool=""), None),
    ],
    ids=["oblong", "uneven", "plain residuals", "three passes", "no classes"],
)
def test_any_model_gives_equal_outputs_for_any_number_of_images(config, size, tmp_path):
    model = disturbed(config)
    before = copy.deepcopy(model.state_dict())
    for suffix in SUFFIXES:
        found = export_model(model.train(), card_of(model), tmp_path / f"m{suffix}", img_size=size)
        assert model.training
        assert found.comparison.count == 16
        assert found.comparison.difference <= 1e-5 * found.comparison.scale
        assert found.comparison.agreement == (100 if config.num_classes else None)
        assert found.comparison.top1 is None
        exported, card = load_exported(tmp_path / f"m{suffix}")
        height, width = card.preprocessing.img_size
        for count in (1, 2, 3, 5):
            images = torch.randn(count, config.in_chans, height, width)
            with torch.no_grad():
                expected = model.eval()(images)
            torch.testing.assert_close(exported(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_a_file_knows_what_a_weights_file_knows(exports):
    model, card = load_model(exports[".safetensors"])
    assert isinstance(model, SReT)
    for suffix in SUFFIXES:
        exported, read = load_model(exports[suffix])
        assert isinstance(exported, Exported)
        assert read == card
        assert (exported.num_classes, exported.dtype) == (10, "float32")
        assert exported.engine == {".onnx": "ONNX Runtime", ".xml": "OpenVINO"}[suffix]
    metadata = {entry.key: entry.value for entry in onnx.load(exports[".onnx"]).metadata_props}
    assert json.loads(metadata["sret.card"])["class_names"] == list(ODD_NAMES)
    assert (metadata["sret.dtype"], metadata["sret.version"]) == ("float32", package.__version__)


def test_the_output_of_an_image_depends_on_neither_batch_nor_threads(exports):
    images = torch.randn(4, 3, 64, 64)
    for suffix in SUFFIXES:
        exported = load_exported(exports[suffix], threads=1)[0]
        together = exported(images)
        assert together.dtype == torch.float32
        assert not together.requires_grad
        for i in range(4):
            torch.testing.assert_close(exported(images[i : i + 1].requires_grad_())[0], together[i], rtol=0, atol=1e-5)
        torch.testing.assert_close(exported(images.to(memory_format=torch.channels_last)), together)
        torch.testing.assert_close(exported(images.double()), together)


def test_images_of_another_size_are_refused(exports):
    for suffix in SUFFIXES:
        exported = load_exported(exports[suffix])[0]
        for shape in ((1, 3, 72, 72), (1, 1, 64, 64), (3, 64, 64), (0, 3, 64, 64)):
            with pytest.raises(InputError, match=r"this exported model takes \(batch, 3, 64, 64\)"):
                exported(torch.zeros(shape))


@pytest.mark.slow
def test_a_weight_is_there_once_however_many_passes_share_it(tmp_path):
    sizes: dict[str, list[int]] = {".onnx": [], ".bin": []}
    for passes in (2, 6):
        stage = StageConfig(embed_dim=128, num_heads=2, num_blocks=1, groups=(1,) * passes, projection_ratio=None)
        model = disturbed(small_config(stages=(stage,), num_classes=500))
        weights = sum(tensor.nbytes for tensor in model.parameters())
        for suffix in SUFFIXES:
            export_model(model, card_of(model), tmp_path / f"{passes}{suffix}")
        for suffix, found in sizes.items():
            found.append((tmp_path / f"{passes}{suffix}").stat().st_size)
        assert sizes[".bin"][-1] == pytest.approx(weights, rel=0.01)
        held = sum(len(tensor.raw_data) for tensor in onnx.load(tmp_path / f"{passes}.onnx").graph.initializer)
        assert held == pytest.approx(weights, rel=0.01)
    for few, many in sizes.values():
        assert many == pytest.approx(few, rel=0.05)


@pytest.mark.parametrize(("config", "size"), [(tiny_config(), (80, 56)), (one_stage(permutation="strided"), (72, 72))])
def test_whatever_is_computed_depends_on_the_image(config, size):
    graph = exporting.to_onnx(disturbed(config), (3, *size)).graph
    reached = {"images"}
    for node in graph.node:  # in an order of computation
        assert reached & set(node.input), f"{node.op_type} could be computed once"
        reached |= set(node.output)
    assert {node.op_type for node in graph.node} >= {"MatMul", "Gelu", "LayerNormalization", "Softmax", "Gather"}


@pytest.mark.slow
def test_commands_give_equal_results_from_every_file(digits, sret, tmp_path):  # noqa: F811
    images = sorted((ROOT / "examples" / "digits").glob("*.png"))
    answers = []
    for suffix in (".safetensors", *SUFFIXES):
        file = digits if suffix == ".safetensors" else tmp_path / f"m{suffix}"
        if file != digits:
            code, out, err = sret("export", digits, file, "--data", "digits", "--samples", 50)
            assert (code, err) == (0, "")
            lines = out.splitlines()
            assert re.fullmatch(rf"{file}: \d\.\d MiB, float32 for (ONNX Runtime|OpenVINO)", lines[0])
            assert lines[1].startswith("parity on 50 images of digits, test: logits differ by at most ")
            assert lines[1].endswith("; the same top-1 for 100.00 %")
            assert re.fullmatch(
                r"accuracy on 50 .*: PyTorch float32 (\d+\.\d\d) %, .* float32 \1 % \(\+0\.00\)", lines[2]
            )
        found = json.loads(sret("eval", "--checkpoint", file, "--json", "--batch_size", 100)[1])
        evaluated = [found[key] for key in ("top1", "top5", "loss", "count")]
        lines = sret("predict", *images, "--checkpoint", file, "--json")[1].splitlines()
        predicted = [json.loads(line)["classes"] for line in lines]
        assert "383,914 parameters" in sret("info", file)[1]
        answers.append((evaluated, predicted))
    for evaluated, predicted in answers[1:]:
        assert evaluated == pytest.approx(answers[0][0], rel=1e-5)
        assert len(predicted) == len(images)
        for one, other in zip(predicted, answers[0][1], strict=True):
            assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize(
    ("suffix", "dtype", "least", "share"),
    [
        pytest.param(".xml", "bfloat16", 98, 0.51, marks=pytest.mark.slow),
        pytest.param(".onnx", "int8", 96, 0.42, marks=pytest.mark.slow),
        (".xml", "int8", 96, 0.32),
    ],
)
def test_fewer_bits_keep_the_predictions(suffix, dtype, least, share, digits, tmp_path):
    out = tmp_path / f"m{suffix}"
    found = export(str(digits), out, dtype, data="digits", samples=200).comparison
    assert found.count == 200
    assert found.agreement >= least
    assert found.top1[1] > 50
    assert found.top1[1] == pytest.approx(found.top1[0], abs=100 - least)
    assert 0 < found.difference < 0.2 * found.scale
    assert load_exported(out)[0].dtype == dtype
    model = load_weights(digits)[0]
    weights = sum(tensor.nbytes for tensor in model.parameters())
    assert (out if suffix == ".onnx" else out.with_suffix(".bin")).stat().st_size < share * weights
    assert listing(tmp_path) == ([out.name] if suffix == ".onnx" else ["m.bin", "m.xml"])


def test_each_output_channel_of_a_quantized_weight_has_a_scale_of_its_own(tmp_path):
    batches = [(torch.randn(2, 3, 32, 32), None)]
    proto = quantized(to_onnx(SReT(one_stage(num_classes=3)), (3, 32, 32)), iter(batches), tmp_path)
    sizes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    inputs = [node.input for node in proto.graph.node if node.op_type == "DequantizeLinear"]
    weights = {x: sizes[scale] for x, scale, *_ in inputs if len(sizes.get(x, ())) == 2}
    assert weights
    assert all(scale and scale[0] in sizes[x] for x, scale in weights.items())


def test_images_are_of_all_classes_and_come_in_batches_of_several_sizes(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "pets", {"cat": 40, "dog": 40})
    weights = make_checkpoint(tmp_path / "two.safetensors", one_stage(num_classes=2), ("cat", "dog"))
    seen = []

    def recorded(model, exported, batches):
        seen.extend(batches)
        return compare(model, exported, seen)

    monkeypatch.setattr(exporting, "compare", recorded)
    for samples, sizes in ((7, [1, 3, 3]), (1000, [1, 3, 4, 4, 4])):
        out = tmp_path / f"{samples}.onnx"
        assert export(str(weights), out, data=str(folder), samples=samples, batch_size=4).comparison.count == sum(sizes)
        assert [len(images) for images, _ in seen] == [len(labels) for _, labels in seen] == sizes
        assert {label for _, labels in seen for label in labels} == {0, 1}
        seen.clear()


def test_a_comparison_counts_what_it_says():
    class Twice(torch.nn.Module):
        num_classes = 3

        def forward(self, x):
            return 2 * x - torch.tensor([0.0, 0.0, 10.0])

    logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 20.0], [0.0, 1.0, 5.0]])
    found = compare(torch.nn.Identity(), Twice(), [(logits[:1], [0]), (logits[1:], [0, 2, 1])])
    assert found == Comparison(count=4, difference=10, scale=20, agreement=75, top1=(50, 75))
    assert compare(torch.nn.Identity(), Twice(), [(logits, None)]).top1 is None


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("answer", "message"), [(1.001, "differ from the model's by up to"), (np.nan, "not finite")])
def test_a_file_with_other_outputs_is_not_kept(suffix, answer, message, tmp_path, monkeypatch):
    def load(path: Path) -> tuple[Exported, Card]:
        exported, card = load_exported(path)
        return Exported(lambda x: answer * exported(torch.from_numpy(x)).numpy(), card, "", ""), card

    monkeypatch.setattr(exporting, "load_exported", load)
    model = disturbed(tiny_config())
    (tmp_path / "other").write_text("kept")
    with pytest.raises(InputError, match=message):
        export_model(model, card_of(model), tmp_path / f"m{suffix}")
    assert listing(tmp_path) == ["other"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_is_full_leaves_nothing(suffix, exports, tmp_path, monkeypatch, sret):  # noqa: F811
    replaced = []

    def full(self: Path, target: Path) -> Path:
        replaced.append(target)
        if target.suffix != ".bin":
            raise OSError(28, "No space left on device")
        os.replace(self, target)
        return target

    monkeypatch.setattr(Path, "replace", full)
    code, _, err = sret("export", exports[".safetensors"], tmp_path / f"m{suffix}")
    assert code == 2
    assert "No space left on device" in one_line(err)
    assert replaced[-1] == tmp_path / f"m{suffix}"
    assert listing(tmp_path) == []


def test_openvino_that_cannot_write_is_one_line(exports, tmp_path, monkeypatch, sret):  # noqa: F811
    import openvino

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Exception from core.cpp:1:\nCannot open the file\n")

    monkeypatch.setattr(openvino, "save_model", fail)
    code, _, err = sret("export", exports[".safetensors"], tmp_path / "m.xml")
    assert code == 2
    assert "OpenVINO could not write the file (Cannot open the file)" in one_line(err)
    assert listing(tmp_path) == []


@pytest.mark.parametrize(("suffix", "written"), [(".onnx", "m.onnx"), (".xml", "m.xml"), (".xml", "m.bin")])
def test_a_file_that_was_written_meanwhile_is_kept(suffix, written, exports, tmp_path, monkeypatch, sret):  # noqa: F811
    def load(path: Path) -> tuple[Exported, Card]:
        (tmp_path / written).write_text("mine")
        return load_exported(path)

    monkeypatch.setattr(exporting, "load_exported", load)
    code, _, err = sret("export", exports[".safetensors"], tmp_path / f"m{suffix}")
    assert code == 2
    assert f"{written} was written by another process meanwhile; choose another name" in one_line(err)
    assert listing(tmp_path) == [written]
    assert (tmp_path / written).read_text() == "mine"


def test_nothing_is_written_over(exports, tmp_path, sret):  # noqa: F811
    for suffix, existing in ((".onnx", "m.onnx"), (".xml", "m.xml"), (".xml", "m.bin")):
        (tmp_path / existing).write_text("mine")
        code, _, err = sret("export", exports[".safetensors"], tmp_path / f"m{suffix}")
        assert code == 2
        assert f"{existing} already exists; delete it, or choose another name" in one_line(err)
        assert (tmp_path / existing).read_text() == "mine"
        (tmp_path / existing).unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["M", "m.pt"], "m.pt: OUT ends in .onnx (for ONNX Runtime) or .xml (for OpenVINO)"),
        (["M", "m"], "m: OUT ends in .onnx"),
        (["M", "m.onnx", "--dtype", "bfloat16"], "give OUT.xml for OpenVINO"),
        (["M", "m.onnx", "--dtype", "float16"], "dtype"),
        (["M", "m.onnx", "--dtype", "int8"], "int8 needs real images for its calibration; give --data"),
        (["M", "m.onnx", "--data", "digits"], "digits has other classes than the checkpoint"),
        (["M", "m.onnx", "--data", "pets"], "the checkpoint has 10 classes, pets has 2"),
        (["M", "m.onnx", "--data", "nowhere"], "no data 'nowhere'"),
        (
            ["M", "m.onnx", "--img_size", "16"],
            "stage 1 at 16x16 pixels: groups (8, 2), pass 1: 4 tokens cannot form",
        ),
        (["M", "m.onnx", "--img_size", "[64,0]"], "img_size (64, 0) is not a number of pixels"),
        (["M", "m.onnx", "--samples", "0"], "samples"),
        (["M", "pets/cat/000.png/m.onnx"], "Not a directory"),
        (["gone.safetensors", "m.onnx"], "gone.safetensors: no such file"),
        (["gone.pth", "m.onnx"], "gone.pth: no such file"),
        (["sret_tt", "m.onnx"], "unknown model 'sret_tt'"),
        (["pets", "m.onnx"], "pets: a folder, not a file"),
        (["pets/cat/000.png", "m.onnx"], "pets/cat/000.png: not a PyTorch checkpoint"),
    ],
)
def test_an_impossible_export_gives_one_line(arguments, message, exports, tmp_path, monkeypatch, sret):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "pets", {"cat": 4, "dog": 4})
    code, out, err = sret("export", *[exports[".safetensors"] if a == "M" else a for a in arguments])
    assert (code, out) == (2, "")
    assert message in one_line(err)
    assert listing(tmp_path) == ["pets"]


def test_images_that_cannot_be_read_stop_it_unless_as_many_may_be_skipped(tmp_path, sret):  # noqa: F811
    folder = make_folder(tmp_path / "pets", {"cat": 9, "dog": 9})
    weights = make_checkpoint(tmp_path / "two.safetensors", one_stage(num_classes=2), ("cat", "dog"))
    for image in folder.glob("cat/*"):
        image.write_text("no image")
    for dtype in ("float32", "int8"):
        code, _, err = sret("export", weights, tmp_path / "m.onnx", "--data", folder, "--dtype", dtype)
        assert code == 2
        assert "not an image that can be read" in one_line(err)
    assert listing(tmp_path) == ["pets", "two.safetensors"]
    options = ["--data", folder, "--dtype", "int8", "--max_corrupt", 18]
    code, out, err = sret("export", weights, tmp_path / "m.onnx", *options)
    assert code == 0
    assert "parity on 2 images of" in out  # the dogs among 4 test images
    assert err.count("skipped (") == 8  # 2 for the comparison, 6 for the calibration; 1 is for validation
    for image in folder.glob("dog/*"):
        image.write_text("no image")
    code, _, err = sret("export", weights, tmp_path / "none.onnx", *options)
    assert code == 2
    assert "none of the images" in err


def test_weights_beyond_what_onnx_can_hold_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "MAX_WEIGHT_BYTES", 1000)
    model = SReT(tiny_config())
    with pytest.raises(InputError, match="more than 2 GiB"):
        export_model(model, card_of(model), tmp_path / "m.onnx")


@pytest.mark.parametrize("package_name", ["onnx_ir", "onnxscript", "onnxruntime", "openvino"])
def test_a_missing_package_names_its_extra(package_name, exports, tmp_path, monkeypatch, sret):  # noqa: F811
    if package_name in ("onnx_ir", "onnxscript"):
        monkeypatch.setattr(exporting, "to_onnx", to_onnx)  # which needs them, unlike what was traced before
    monkeypatch.setitem(sys.modules, package_name, None)
    suffix = ".xml" if package_name == "openvino" else ".onnx"
    code, _, err = sret("export", exports[".safetensors"], tmp_path / f"m{suffix}")
    assert code == 2
    assert one_line(err) == f"sret: error: this command needs {package_name}; run: pip install 'sret[export]'\n"
    assert listing(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_that_are_not_ours_are_refused(suffix, exports, tmp_path, sret):  # noqa: F811
    path, whole = tmp_path / f"m{suffix}", exports[suffix].read_bytes()
    weights = exports[".xml"].with_suffix(".bin").read_bytes()
    foreign = whole.replace(b"sret.card", b"tres.card").replace(b"<card ", b"<kard ")
    spoilt = whole.replace(b'\\"config\\"', b'\\"konfig\\"').replace(b"&quot;config&quot;", b"&quot;konfig&quot;")
    spoilt = spoilt.replace(b'{"config":', b'{"konfig":')
    cases = [
        (whole[: len(whole) // 2], "truncated|is damaged"),
        (b"", "truncated"),
        (b"<html></html>", "without the metadata that `sret export` writes"),
        (foreign, "without the metadata that `sret export` writes"),
        (spoilt, "its metadata cannot be read by this version of sret"),
        (whole + b" ", "is damaged"),
    ]
    for content, message in cases:
        path.write_bytes(content)
        path.with_suffix(".bin").write_bytes(weights)
        if content in (foreign, spoilt):
            seal(path)
        assert content != whole
        for command in (["predict", "a.png", "--checkpoint", path], ["eval", "--checkpoint", path], ["info", path]):
            code, out, err = sret(*command)
            assert (code, out) == (2, "")
            assert re.search(message, one_line(err)), err
    with pytest.raises(InputError, match=f"gone{suffix}: no such file"):
        load_model(tmp_path / f"gone{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(InputError, match="a folder, not a file"):
        load_exported(tmp_path / f"folder{suffix}")
    with pytest.raises(InputError, match=r"exported model ends in .onnx or .xml"):
        load_exported(exports[".safetensors"])
    with pytest.raises(InputError, match="use the weights it was exported from"):
        load_weights(exports[suffix])


def test_an_xml_answers_with_its_own_weights_alone(exports, tmp_path):
    path, weights = tmp_path / "m.xml", exports[".xml"].with_suffix(".bin").read_bytes()
    path.write_bytes(exports[".xml"].read_bytes())
    with pytest.raises(InputError, match=r"m.bin: no such file"):
        load_exported(path)
    for content in (weights[:-100], weights[:1000] + b"\1\2\3\4" + weights[1004:]):
        path.with_suffix(".bin").write_bytes(content)
        with pytest.raises(InputError, match=r"m.xml or m.bin is damaged, or of another export"):
            load_exported(path)
    path.with_suffix(".bin").write_bytes(weights)
    load_exported(path)


def test_a_published_name_is_fetched(tmp_path, monkeypatch):
    torch.save({"model": official_state_dict("SReT_T")}, tmp_path / "SReT_T.pth")
    monkeypatch.setattr("sret.checkpoints.download.fetch", lambda url: tmp_path / "SReT_T.pth")
    seen = []
    monkeypatch.setattr(exporting, "export_model", lambda *arguments: seen.append(arguments))
    export("sret_t.dist_in1k", tmp_path / "m.onnx", img_size=96)
    model, card, out, dtype, size, *_ = seen[0]
    assert (model.config, out, dtype, size) == (card.config, tmp_path / "m.onnx", "float32", 96)
    assert card.preprocessing.crop_pct == 0.875


@pytest.mark.slow
def test_nothing_is_told_but_the_report(tmp_path):
    """Least of all to others: OpenVINO reports every import, and keeps an identity for that in the home folder."""
    script = (
        "import socket, sys; from sret.cli import main as cli\n"
        "def refuse(*_): raise SystemExit('a connection')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    names = tuple("0123456789")
    weights = make_checkpoint(tmp_path / "m.safetensors", one_stage(in_chans=1, img_size=32, stem_stride=4), names)
    options = ["--dtype", "int8", "--data", "digits", "--samples", "20"]
    command = [sys.executable, "-c", script, "export", str(weights), str(tmp_path / "m.xml"), *options]
    home = tmp_path / "home"
    home.mkdir()
    result = processes.run(command, env={**os.environ, "HOME": str(home)})
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) == 3
    assert "intel" not in listing(home)


def test_what_is_no_xml_of_openvino_is_not_shown_to_it(tmp_path, capfd):
    """It would try every format it knows, and print what each makes of it."""
    for content in (b"hello", b"<html></html>"):
        (tmp_path / "m.xml").write_bytes(content)
        (tmp_path / "m.bin").write_bytes(b"")
        with pytest.raises(InputError, match="without the metadata"):
            load_exported(tmp_path / "m.xml")
        assert capfd.readouterr() == ("", "")


def test_a_card_of_another_size_is_what_the_file_takes(exports, tmp_path):
    model, card = load_weights(exports[".safetensors"])
    card = replace(card, preprocessing=replace(card.preprocessing, img_size=(80, 56)))
    export_model(model, card, tmp_path / "m.onnx")
    exported, read = load_exported(tmp_path / "m.onnx")
    assert read.preprocessing == card.preprocessing
    assert read.config == replace(card.config, img_size=(80, 56))
    assert exported(torch.zeros(1, 3, 80, 56)).shape == (1, 10)


@pytest.mark.parametrize(("crop_pct", "image"), [(1.0, (64, 64)), (0.875, (90, 61)), (0.875, (40, 100))])
def test_the_documented_program_needs_no_sret(crop_pct, image, exports, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    program = next(block for block in blocks if "onnxruntime" in block)
    assert not re.search(r"import (torch|sret|timm)", program)
    model, card = load_weights(exports[".safetensors"])
    card = replace(card, preprocessing=replace(card.preprocessing, crop_pct=crop_pct))
    export_model(model, card, tmp_path / "model.onnx")
    pixels = torch.randint(256, (*image, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    (expected,) = predict(model, card, [tmp_path / "image.png"], top_k=3)
    assert capsys.readouterr().out == "".join(f"{name} {share:.3f}\n" for name, share in expected.classes)
