"""The measuring instrument: what it refuses to time, that its clock is fair, that it prints what it measured."""

import itertools
import json
import math
import os
import re
import shutil
import sys
import time

import numpy as np
import pytest
import timm
import torch
from conftest import small_config
from torch import Tensor, nn

from sret import InputError, SReT, fuse, model_cost
from sret.bench import runner
from sret.bench import timing as measure
from sret.bench.candidates import TOLERANCE, subject_of
from sret.bench.report import as_text, check_figure, draw
from sret.bench.runner import Settings, bench
from sret.bench.timing import alternate, count_macs, ratio, roofline, spread
from sret.checkpoints.card import Card, save_weights
from sret.cli import main as cli
from sret.data.preprocess import Preprocessing
from sret.export.runtime import Exported
from sret.models.variants import CONFIGS

CPU = torch.device("cpu")
QUICK = Settings(batch_size=2, rounds=3, device="cpu")


@pytest.fixture(autouse=True)
def _small_products(monkeypatch):
    monkeypatch.setitem(measure.ROOFLINE_SIDE, "cpu", 128)


@pytest.fixture
def command(capsys):
    """Runs `sret bench`; gives (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["bench", *map(str, arguments), "--device=cpu"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def small_model(**changes: object) -> SReT:
    torch.manual_seed(0)
    return SReT(small_config(**changes))


# the clock -----------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.pace, self.log = 0.0, 1.0, []
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(measure.time, "sleep", lambda _: self.log.append("pause"))

    def contender(self, name: str, *seconds: float):
        """Takes these seconds, call by call, and the last of them ever after; all of it times the machine's pace."""
        durations = itertools.chain(seconds, itertools.repeat(seconds[-1]))

        def run() -> None:
            self.log.append(name)
            self.now += self.pace * next(durations)

        return run


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_ratios_survive_a_machine_that_slows_down(clock):
    paces = iter([1.0] * 8 + [3.0] * 8)

    def slowing() -> None:
        clock.pace = next(paces, 3.0)
        clock.now += clock.pace * 0.1

    times = alternate({"a": slowing, "b": clock.contender("b", 0.05)}, rounds=9)
    assert max(times["a"]) / min(times["a"]) == pytest.approx(3)
    assert ratio(times["b"], times["a"]) == pytest.approx(0.5)


def test_warm_up_is_not_counted(clock):
    times = alternate({"a": clock.contender("a", 60, 10, 1.0), "b": clock.contender("b", 30, 2.0)}, rounds=4)
    assert times == {"a": pytest.approx([1.0] * 4), "b": pytest.approx([2.0] * 4)}


def test_every_round_has_every_contender_once_and_none_is_favoured_by_its_place(clock):
    names = ["a", "b", "c"]

    def rounds(seed: int) -> list[list[str]]:
        clock.log.clear()
        alternate({name: clock.contender(name, 1.0) for name in names}, rounds=12, seed=seed)
        turns = [name for name in clock.log[3 * measure.WARM_UP :] if name != "pause"]
        return [turns[i : i + 3] for i in range(0, len(turns), 3)]

    orders = rounds(seed=0)
    assert len(orders) == 12
    assert all(sorted(order) == names for order in orders)
    for one, other in itertools.combinations(names, 2):
        assert sum(order.index(one) < order.index(other) for order in orders) == 6
    assert len(set(map(tuple, orders))) > 2
    assert orders == rounds(seed=0) != rounds(seed=1)


def test_short_calls_are_repeated_until_a_turn_is_long_enough(clock):
    alternate({"short": clock.contender("short", 0.003), "long": clock.contender("long", 1.0)}, rounds=1, turn=0.02)
    counted = clock.log[2 * measure.WARM_UP :]
    assert counted.count("short") == 7
    assert counted.count("long") == 1


def test_work_that_a_call_only_begins_is_waited_for_within_the_time(clock):
    def synchronise() -> None:
        clock.now += 2.0

    assert alternate({"a": clock.contender("a", 1.0)}, 2, synchronise) == {"a": pytest.approx([3.0] * 2)}


def test_the_spread_is_the_middle_half_over_the_median():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert spread([7.0]) == 0


def test_real_time_is_measured():
    times = alternate({"a": lambda: time.sleep(0.02), "b": lambda: time.sleep(0.04)}, rounds=3)
    assert 1.5 < ratio(times["b"], times["a"]) < 2.5


# counts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [small_config(), small_config(img_size=(40, 24), in_chans=1), CONFIGS["sret_t"]])
def test_counted_multiply_adds_equal_the_formula(config):
    image = torch.zeros(1, config.in_chans, *config.input_size)
    model = SReT(config).eval()
    assert count_macs(model, image) == model_cost(config).macs
    assert count_macs(fuse(model), image) == model_cost(config).macs


def test_attention_of_other_models_is_counted_too():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, depth=1, img_size=32).eval()
    N, C = 5, 192
    patches, head = 4 * C * 3 * 16 * 16, C * 7
    assert count_macs(model, torch.zeros(1, 3, 32, 32)) == patches + N * C * 12 * C + 2 * N * N * C + head


def test_the_roofline_is_above_what_any_product_of_the_kind_reaches():
    a = torch.randn(64, 64)
    seconds = min(alternate({"": lambda: a @ a}, rounds=5)[""])
    assert roofline(CPU, torch.float32, side=512) > 0.5 * 2 * 64**3 / seconds


class Hungry(nn.Module):
    """Takes and returns 96 MiB on the way to its answer."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) + torch.ones(24 * 2**20).mean()


@pytest.mark.slow
@pytest.mark.skipif(not measure.can_measure_memory(), reason="no /proc/self/clear_refs")
def test_memory_is_what_a_run_takes_for_a_while():
    report = bench({"hungry": Hungry}, Settings(batch_size=1, rounds=1, device="cpu", memory=True))
    assert report.rows[0].peak_mib == pytest.approx(96, abs=3)
    with pytest.raises(InputError, match="cannot be sent there"):
        bench({"local": lambda: Hungry()}, Settings(batch_size=1, rounds=1, device="cpu", memory=True))


# checked before timing -----------------------------------------------------------------------------------------------


@pytest.fixture
def never_timed(monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(runner, "alternate", fail)


@pytest.mark.parametrize("wrong", [1.001, math.nan])
@pytest.mark.usefixtures("never_timed")
def test_an_engine_that_answers_otherwise_is_refused_before_timing(wrong, monkeypatch):
    class Wrong(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return wrong * self.model(x)

    monkeypatch.setattr("sret.bench.engines.fuse", Wrong)
    with pytest.raises(InputError, match=r"mine fused float32: its answer differs .* nothing was timed"):
        bench({"other": nn.Sequential(nn.AvgPool2d(64), nn.Flatten()), "mine": small_model()}, fused(img_size=(64, 64)))


def fused(**changes: object) -> Settings:
    return Settings(**{"batch_size": 2, "rounds": 3, "device": "cpu", "engines": ("eager", "fused"), **changes})


def test_a_wrong_permutation_would_be_seen():
    settings = Settings(batch_size=2, img_size=(64, 64))
    one = subject_of("one", "sret_t", settings, CPU)
    torch.rand(1)
    other = subject_of("other", "sret_t:permutation=strided", settings, CPU)
    assert torch.equal(one.images, other.images)
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True))
    answer = one.ready("eager", "float32")()
    difference = (answer - other.ready("eager", "float32")()).abs().max() / answer.abs().max()
    assert difference > 3 * TOLERANCE["float32"]


def test_no_weights_are_left_constant():
    """Cait starts with scales of 1e-5 and less, behind which a branch could go wrong unseen."""
    model = subject_of("cait", "cait_xxs24_224", Settings(batch_size=1), CPU).model
    assert all(p.std() > 1e-3 for p in model.parameters() if p.numel() > 2)


@pytest.mark.usefixtures("never_timed")
def test_in_training_gradients_are_checked_too(monkeypatch):
    """Here the first loss is right, and no gradient flows."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda *x: f(*x).detach() + 0 * f(*x))
    settings = Settings(batch_size=4, device="cpu", is_training=True, engines=("eager", "compile"))
    for name, model in {"mine": small_model(), "other": timm.create_model("test_vit")}.items():
        with pytest.raises(InputError, match=f"{name} compile float32: its loss differs"):
            bench({name: model}, settings)


def test_training_is_timed(monkeypatch):
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = bench(
        {"a": model}, Settings(batch_size=4, rounds=2, device="cpu", is_training=True, dtypes=tuple(TOLERANCE))
    )
    assert [row.dtype for row in report.rows] == ["float32", "bfloat16"]
    assert report.left_out == ("eager float16: training in float16 needs its loss scaled; take bfloat16",)
    assert report.rows[0].difference == 0 < report.rows[1].difference < TOLERANCE["bfloat16"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_every_engine_agrees():
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    engines = ("eager", "fused", "cudagraphs", "onnxruntime", "openvino")
    settings = fused(engines=engines, dtypes=("float32", "bfloat16"), img_size=(64, 64))
    report = bench({"mine": small_model(), "other": "test_vit"}, settings)
    wanted = [
        (name, engine, dtype)
        for engine in engines
        for dtype in settings.dtypes
        for name in ("mine", "other")
        if engine != "cudagraphs"
        and (engine, dtype) != ("onnxruntime", "bfloat16")
        and (name, engine) != ("other", "fused")
    ]
    assert [(row.model, row.engine, row.dtype) for row in report.rows] == wanted
    assert all(row.difference <= (1e-5 if row.dtype == "float32" else 0.05) for row in report.rows)
    assert "other fused: only models of sret can be fused" in report.left_out


@pytest.mark.slow
def test_compiled_models_agree_and_may_be_many():
    """Several of one class: each has code of its own, none falls back to running eagerly."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    models = {f"{width}": nn.Sequential(nn.Flatten(), nn.Linear(48, width), nn.GELU()) for width in range(2, 12)}
    torch.compiler.reset()
    report = bench(models, fused(engines=("compile",), img_size=(4, 4)))
    assert all(row.difference < 1e-5 for row in report.rows)
    assert len(report.rows) == len(models)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= len(models)


# rows ----------------------------------------------------------------------------------------------------------------


def test_rows_are_computed_from_the_times(monkeypatch):
    given = {
        "a eager float32": [0.1, 0.2, 0.3],
        "b eager float32": [0.2, 0.2, 0.2],
        "a fused float32": [0.05, 0.05, 0.09],
        "b fused float32": [0.1, 0.1, 0.09],
    }
    monkeypatch.setattr(runner, "alternate", lambda contenders, *_: {name: given[name] for name in contenders})
    monkeypatch.setattr(runner, "roofline", lambda *_: 1e9)
    report = bench({"a": small_model(), "b": small_model()}, fused())
    a, b, fused_a, fused_b = report.rows
    assert [(row.model, row.engine) for row in report.rows] == [(n, e) for e in ("eager", "fused") for n in "ab"]
    assert (a.ms_per_image, a.images_per_s, a.iqr_percent) == (100, 10, pytest.approx(50))
    assert (b.vs_first, b.vs_first_model) == (1, 1)
    assert fused_a.vs_first == pytest.approx(0.3)
    assert fused_b.vs_first == pytest.approx(0.5)
    assert (fused_a.vs_first_model, fused_b.vs_first_model) == (1, 2)
    macs = model_cost(small_config()).macs
    assert a.macs == macs
    assert a.percent_of_roofline == pytest.approx(100 * 2 * macs * 2 / 0.2 / 1e9)
    assert a.parameters == model_cost(small_config()).parameters
    assert b.seconds == (0.2, 0.2, 0.2)


def test_a_model_twice_is_compared_with_itself():
    report = bench(["resnet10t", "resnet10t"], Settings(batch_size=1, img_size=(32, 32), rounds=1, device="cpu"))
    assert [row.model for row in report.rows] == ["resnet10t", "resnet10t (2)"]


def test_files_of_weights_and_of_export_take_part(tmp_path):
    pytest.importorskip("openvino")
    model = small_model()
    preprocessing = Preprocessing(img_size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3)
    card = Card(config=model.config, preprocessing=preprocessing)
    save_weights(tmp_path / "m.safetensors", model.state_dict(), card)
    exported = Exported(lambda x: np.zeros((len(x), 10), np.float32), card, "OpenVINO", "int8")
    for order in ((0, 1), (1, 0)):
        sources = [("m", str(tmp_path / "m.safetensors")), ("x", exported)]
        report = bench(dict(sources[i] for i in order), QUICK)
        assert [row.model for row in report.rows] == [sources[i][0] for i in order]
        row = next(row for row in report.rows if row.model == "x")
        assert (row.engine, row.dtype, row.macs) == ("openvino", "int8", model_cost(model.config).macs)
        assert row.percent_of_roofline is row.difference is None
        assert " - " in as_text(report)
        assert report.about["openvino"]
    with pytest.raises(InputError, match="x is exported or fused, so it cannot be trained"):
        bench({"x": exported}, Settings(device="cpu", is_training=True))


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("sret_t", None, (3, 224, 224)),
        ("sret_t:img_size=64,in_chans=1", None, (1, 64, 64)),
        ("sret_t", (64, 48), (3, 64, 48)),
        ("vit_tiny_patch16_224", None, (3, 224, 224)),
        ("vit_tiny_patch16_224", (64, 64), (3, 64, 64)),
        ("vit_tiny_patch16_224:img_size=96,in_chans=1", None, (1, 96, 96)),
        ("resnet10t", (40, 40), (3, 40, 40)),
        ("sret_t_unsliced_384", None, (3, 384, 384)),
    ],
)
def test_images_have_the_size_that_was_asked_for_or_the_model_s_own(name, size, expected):
    assert subject_of(name, name, Settings(batch_size=1, img_size=size), CPU).images.shape[1:] == expected


def test_settings_of_pytorch_are_as_before(monkeypatch):
    threads = torch.get_num_threads()
    seen = []
    monkeypatch.setattr(runner, "roofline", lambda *_: seen.append(torch.get_num_threads()) or 1.0)
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    bench({"a": small_model}, Settings(batch_size=1, rounds=1, device="cpu", threads=threads + 1))
    torch.manual_seed(5)
    assert seen == [threads + 1]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.randn(3), expected)


# errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", ["[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", "std::bad_alloc"]
)
@pytest.mark.usefixtures("never_timed")
def test_a_batch_that_does_not_fit_is_named(words):
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 1:
                raise RuntimeError(words)
            return x.mean((2, 3))

    with pytest.raises(InputError, match=r"^large: a batch of 3 does not fit in memory; try a smaller --batch-size$"):
        bench({"large": Large()}, Settings(batch_size=3, device="cpu"))


def test_what_a_compiler_or_converter_cannot_do_is_left_out_with_its_reason(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("\n  no rule for aten::odd\nat length")

    monkeypatch.setattr(torch, "compile", refuse)
    report = bench({"a": small_model()}, fused(engines=("eager", "compile")))
    assert report.left_out == ("a compile float32: no rule for aten::odd",)
    assert "left out: a compile float32: no rule for aten::odd" in as_text(report)

    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(InputError, match=r"a compile float32: torch.compile needs a C\+\+ compiler, such as g\+\+"):
        bench({"a": small_model()}, fused(engines=("eager", "compile")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing models"),
        (["sret_tt"], "no model 'sret_tt': give a model of timm or a weights file; did you mean 'sret_t'?"),
        (["vit_tiny_patch16_22"], "did you mean 'vit_tiny_patch16_224'?"),
        (["gone.safetensors"], "gone.safetensors: no such file"),
        (["sret_t:permutation=stridid"], "permutation is 'stridid'; it must be one of random, strided"),
        (["sret_t:permutatio=strided"], "did you mean 'permutation'?"),
        (["sret_t:strided"], "options are written sret_t:name=value"),
        (["sret_t:img_size=64", "--img-size", "64"], "both img_size and --img-size are given"),
        (["resnet10t:foo=3"], "resnet10t:foo=3 cannot be made: "),
        (["resnet10t:features_only=true"], "does not give one row of logits"),
        (["sret_t", "--img-size", "8"], "stage 1 at 8x8 pixels"),
        (
            ["sret_t:img_size=32", "resnet10t", "--batch-size", 10**12],
            "a batch of 1000000000000 does not fit in memory",
        ),
        (["sret_t", "--engines", "eager,fast"], "unknown engine 'fast'; there are eager, fused"),
        (["sret_t", "--dtype", "bfloat"], "unknown dtype 'bfloat'; there are float32, bfloat16, float16; did you mean"),
        (["sret_t", "--rounds", "0"], "rounds"),
        (
            ["sret_t", "--engines", "openvino", "--train"],
            "nothing is left to compare: openvino float32: trains nothing",
        ),
        (["sret_t", "--engines", "cudagraphs"], "needs --device cuda"),
        (["sret_t", "--figure", "a.jpeg"], "a figure's name ends in .png, .svg, .pdf"),
        (["sret_t", "--figure", "gone/a.png"], "no such folder for the figure"),
    ],
)
@pytest.mark.usefixtures("never_timed")
def test_what_cannot_be_compared_is_one_line(arguments, message, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("sret: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="unknown device 'tpu'; take cpu or cuda"):
        Settings(device="tpu").torch_device()
    with pytest.raises(InputError, match=r"torch sees \d+ CUDA devices here, so not cuda:99"):
        Settings(device="cuda:99").torch_device()


def test_a_missing_package_is_named_with_its_extra(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, _, err = command("sret_t", "--img-size=32", "--engines=onnxruntime", "--batch-size=1")
    assert code == 2
    assert "pip install 'sret[export]'" in err


# what people see -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    contenders = {"mine": SReT(small_config()), "resnet": "resnet10t"}
    return bench(contenders, fused(img_size=(64, 64)))


def test_the_table_has_the_numbers_of_the_json_line(report):
    line = report.to_json()
    assert "\n" not in line
    values = json.loads(line)
    assert values["benchmark"] == "bench"
    assert values["batch_size"] == 2
    text = as_text(report)
    rows = [line.split() for line in text.splitlines() if re.match("  [a-z]", line)]
    assert len(values["rows"]) == len(rows) == 3
    for row, shown in zip(values["rows"], rows, strict=True):
        assert shown[0] == row["model"]
        assert float(shown[1].replace(",", "")) == pytest.approx(row["ms_per_image"], rel=6e-3)
        assert float(shown[2]) == pytest.approx(row["iqr_percent"], abs=0.051)
        assert float(shown[4].replace(",", "")) == pytest.approx(row["images_per_s"], rel=6e-3)
        assert float(shown[5]) == pytest.approx(row["vs_first"], abs=0.0051)
        assert "seconds" not in row
    assert values["rows"][0]["difference"] == 0
    assert values["left_out"] == ["resnet fused: only models of sret can be fused"]
    assert max(map(len, re.findall(r"^(?:  .*| *model.*)$", text, re.MULTILINE))) <= 80


def test_the_figure_is_a_image_and_overwrites_nothing(report, tmp_path):
    path = tmp_path / "a.png"
    check_figure(path)
    draw(report, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="exists already"):
        check_figure(path)
    draw(report, tmp_path / "a.svg", title="a title")
    assert "a title" in (tmp_path / "a.svg").read_text() or (tmp_path / "a.svg").stat().st_size > 1000


def test_the_command_prints_a_table_and_one_line_of_json(command, tmp_path):
    line = ("sret_t", "resnet10t", "--img-size", 32, "--batch-size", 1, "--rounds", 2)
    code, out, err = command(*line, "--figure", tmp_path / "a.png", "--threads", 1)
    assert (code, err) == (0, "")
    assert "\neager, float32\n" in out
    values = json.loads(out.splitlines()[-1])
    assert [row["model"] for row in values["rows"]] == ["sret_t", "resnet10t"]
    assert values["threads"] == 1
    assert values["rows"][0]["macs"] == model_cost(CONFIGS["sret_t"], (32, 32)).macs
    assert (tmp_path / "a.png").exists()
    code, out, _ = command(*line, "--json")
    assert code == 0
    assert out.count("\n") == 1
    assert json.loads(out)["rows"][1]["pixels"] == [32, 32]


def test_sizes_stand_in_the_table_where_they_differ():
    report = bench(
        {"a": "sret_t:img_size=32", "b": "sret_t:img_size=64"}, Settings(batch_size=1, rounds=1, device="cpu")
    )
    assert re.search(r"a +32x32 ", as_text(report))
    assert re.search(r"b +64x64 ", as_text(report))
