"""`sret bench` refuses models whose outputs differ, times fairly, and prints what it measured."""

import itertools
import json
import math
import re
import sys
import time

import memory
import numpy as np
import performance_figure
import pytest
import timm
import torch
from conftest import small_config
from torch import Tensor, nn

from sret import InputError, SReT, fuse, model_cost
from sret.bench import runner, timing
from sret.bench.candidates import DTYPES, make_subject, objection
from sret.bench.report import Report, Row
from sret.bench.runner import TOLERANCE, Settings, bench
from sret.bench.timing import alternate, quartiles, ratio, roofline
from sret.checkpoints.card import Card, save_weights
from sret.cli import main as cli
from sret.data.preprocess import Preprocessing
from sret.export.runtime import Exported
from sret.models.build import count_macs
from sret.models.variants import CONFIGS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_matrix_products(monkeypatch):
    monkeypatch.setattr(runner, "roofline", lambda *_: 50e9)


@pytest.fixture
def command(capsys):
    """Runs `sret bench`; gives (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["bench", *map(str, arguments), "--device=cpu"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def small_model() -> SReT:
    torch.manual_seed(0)
    return SReT(small_config())


def quick(**changes: object) -> Settings:
    return Settings(**{"batch_size": 2, "rounds": 2, "device": "cpu", **changes})


# times ---------------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only in calls of candidates."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.pace, self.log = 0.0, 1.0, []
        monkeypatch.setattr(timing, "timer", lambda: self.now)
        monkeypatch.setattr(timing.time, "sleep", lambda _: None)

    def candidate(self, name: str, *seconds: float):
        """Takes these seconds, call by call, and then always the last of them, each multiplied by the pace."""
        durations = itertools.chain(seconds, itertools.repeat(seconds[-1]))

        def run() -> None:
            self.log.append(name)
            self.now += self.pace * next(durations)

        return run


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_ratios_are_right_although_the_machine_slows_down(clock):
    paces = iter([1.0] * 8 + [3.0] * 8)

    def slowing() -> None:
        clock.pace = next(paces, 3.0)
        clock.now += clock.pace * 0.1

    times = alternate({"a": slowing, "b": clock.candidate("b", 0.05)}, rounds=9)
    assert max(times["a"]) / min(times["a"]) == pytest.approx(3)
    assert ratio(times["b"], times["a"]) == pytest.approx(0.5)


def test_warm_up_does_not_count(clock):
    times = alternate({"a": clock.candidate("a", 60, 10, 1.0), ("b", 1): clock.candidate("b", 30, 2.0)}, rounds=4)
    assert times == {"a": pytest.approx([1.0] * 4), ("b", 1): pytest.approx([2.0] * 4)}


def test_each_round_has_each_candidate_once_and_no_place_is_favoured(clock):
    alternate({name: clock.candidate(name, 1.0) for name in "abc"}, rounds=12)
    turns = clock.log[3 * 3 :]
    orders = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert len(orders) == 12
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    for one, other in itertools.combinations("abc", 2):
        assert sum(order.index(one) < order.index(other) for order in orders) == 6
    assert len(set(map(tuple, orders))) > 2


def test_short_calls_are_repeated_until_a_turn_is_long_enough(clock):
    alternate({"short": clock.candidate("short", 0.003), "long": clock.candidate("long", 1.0)}, rounds=1)
    counted = clock.log[2 * 3 :]
    assert counted.count("short") == math.ceil(timing.TURN / 0.003) == 7
    assert counted.count("long") == 1


def test_quartiles_of_one_time_and_of_several():
    assert quartiles([5.0, 2.0, 1.0, 4.0, 3.0]) == (2, 3, 4)
    assert quartiles([7.0]) == (7, 7, 7)


def test_real_time_is_measured():
    times = alternate({"a": lambda: time.sleep(0.02), "b": lambda: time.sleep(0.04)}, rounds=3)
    assert 1.5 < ratio(times["b"], times["a"]) < 2.5


# counts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [small_config(), small_config(img_size=(40, 24), in_chans=1), CONFIGS["sret_t"]])
def test_counted_macs_equal_the_formula(config):
    image = torch.zeros(1, config.in_chans, *config.input_size)
    model = SReT(config).eval()
    assert count_macs(model, image) == model_cost(config).macs
    assert count_macs(fuse(model), image) == model_cost(config).macs


def test_attention_of_other_models_is_counted_too():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, depth=1, img_size=32).eval()
    N, C = 5, 192
    patches, head = 4 * C * 3 * 16 * 16, C * 7
    assert count_macs(model, torch.zeros(1, 3, 32, 32)) == patches + N * C * 12 * C + 2 * N * N * C + head


def test_no_small_product_is_faster_than_the_roofline():
    a = torch.randn(64, 64)
    seconds = min(alternate({"": lambda: a @ a}, rounds=5)[""])
    assert roofline(CPU, torch.float32) > 0.5 * 2 * 64**3 / seconds


def test_the_roofline_is_the_fastest_product_of_all_sizes(monkeypatch, clock):
    """Here a product of n x n takes n / 1e6 seconds, but 1 second for 1024, after which no larger one is measured."""
    sides = []

    def product(a: Tensor, b: Tensor) -> None:
        sides.append(len(a))
        clock.now += len(a) / 1e6 if len(a) != 1024 else 1.0

    monkeypatch.setattr(torch, "mm", product)
    assert roofline(CPU, torch.float32) == pytest.approx(2 * 512**3 / (512 / 1e6))
    assert sorted(set(sides)) == [256, 512, 1024]


# outputs are compared before anything is timed -----------------------------------------------------------------------


@pytest.fixture
def never_timed(monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(runner, "alternate", fail)


class Wrong(nn.Module):
    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.model(x)


@pytest.mark.parametrize("factor", [1.001, math.nan])
@pytest.mark.usefixtures("never_timed")
def test_an_engine_with_other_outputs_is_refused(factor, monkeypatch):
    monkeypatch.setattr("sret.bench.candidates.fuse", lambda model: Wrong(model, factor))
    with pytest.raises(InputError, match="mine fused float32: outputs or losses differ"):
        bench({"mine": small_model()}, quick(engines=("eager", "fused")))


@pytest.mark.usefixtures("never_timed")
def test_in_training_wrong_gradients_are_refused(monkeypatch):
    """Here the first loss is right, and no gradient flows."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda *x: f(*x).detach() + 0 * f(*x))
    for name, model in {"mine": small_model(), "other": timm.create_model("test_vit")}.items():
        with pytest.raises(InputError, match=f"{name} compile float32: outputs or losses differ"):
            bench({name: model}, quick(batch_size=4, is_training=True, engines=("eager", "compile")))


def test_another_permutation_differs_by_more_than_the_tolerance():
    one = make_subject("one", "sret_t", 2, (64, 64), CPU)
    torch.rand(1)
    other = make_subject("other", "sret_t:permutation=strided", 2, (64, 64), CPU)
    assert torch.equal(one.images, other.images)
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True))
    expected, found = (subject.predicting("eager", "float32")() for subject in (one, other))
    assert (expected - found).abs().max() / expected.abs().max() > 3 * TOLERANCE["float32"]


def test_no_weights_are_constant():
    """CaiT starts with scales of 1e-5 and less, which would hide errors of a branch."""
    model = make_subject("cait", "cait_xxs24_224", 1, None, CPU).model
    assert all(p.std() > 1e-3 for p in model.parameters() if p.numel() > 2)


def test_training_is_timed_with_copies_of_the_weights():
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = bench({"a": model}, quick(batch_size=4, is_training=True, dtypes=tuple(TOLERANCE)))
    assert [row.dtype for row in report.rows] == ["float32", "bfloat16"]
    assert report.left_out == ("a eager float16: training in float16 needs loss scaling; use bfloat16",)
    assert report.rows[0].difference == 0 < report.rows[1].difference < TOLERANCE["bfloat16"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_all_engines_agree():
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    engines = ("eager", "fused", "cudagraphs", "onnxruntime", "openvino")
    settings = quick(engines=engines, dtypes=("float32", "bfloat16"), img_size=(64, 64))
    models = {"mine": small_model(), "other": "test_vit"}
    report = bench(models, settings)
    assert [(row.model, row.engine, row.dtype) for row in report.rows] == [
        (name, engine, dtype)
        for engine in engines
        for dtype in settings.dtypes
        for name in models
        if engine != "cudagraphs"
        and (engine, dtype) != ("onnxruntime", "bfloat16")
        and (name, engine) != ("other", "fused")
    ]
    assert all(row.difference <= (1e-5 if row.dtype == "float32" else 0.05) for row in report.rows)


@pytest.mark.slow
def test_compiled_models_agree_and_may_be_many():
    """Ten models of one class: each is compiled, and none runs eagerly instead."""
    models = {f"{width}": nn.Sequential(nn.Flatten(), nn.Linear(48, width)) for width in range(2, 12)}
    torch.compiler.reset()
    report = bench(models, quick(engines=("compile",), img_size=(4, 4)))
    if not report.rows:
        pytest.skip("no C++ compiler")
    assert all(row.difference < 1e-5 for row in report.rows)
    assert len(report.rows) == len(models)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= len(models)


@pytest.mark.parametrize(
    ("engine", "dtype", "device", "is_training", "reason"),
    [
        ("eager", "float32", "cpu", False, ""),
        ("compile", "bfloat16", "cpu", True, ""),
        ("eager", "float16", "cuda", False, ""),
        ("fused", "float32", "cpu", False, "only models of sret"),
        ("openvino", "float32", "cpu", True, "eager or compile"),
        ("eager", "float16", "cuda", True, "loss scaling"),
        ("onnxruntime", "float32", "cuda", False, "--device cpu"),
        ("cudagraphs", "float32", "cpu", False, "--device cuda"),
        ("eager", "float16", "cpu", False, "--device cuda"),
        ("onnxruntime", "bfloat16", "cpu", False, "no bfloat16"),
        ("openvino", "bfloat16", "cpu", False, ""),
    ],
)
def test_what_cannot_run_has_a_reason(engine, dtype, device, is_training, reason):
    found = objection(nn.Linear(1, 1), engine, dtype, torch.device(device), is_training)
    assert reason in found
    assert bool(reason) == bool(found)


def test_a_compiler_or_converter_that_fails_is_left_out_with_its_reason(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("\n  no rule for aten::odd\nat length")

    monkeypatch.setattr(torch, "compile", refuse)
    report = bench({"a": small_model()}, quick(engines=("eager", "compile")))
    assert report.left_out == ("a compile float32: no rule for aten::odd",)
    assert "left out: a compile float32: no rule for aten::odd" in report.to_text()


# models and images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("sret_t", None, (3, 224, 224)),
        ("sret_t:img_size=64,in_chans=1", None, (1, 64, 64)),
        ("sret_t", (64, 48), (3, 64, 48)),
        ("vit_tiny_patch16_224", (64, 64), (3, 64, 64)),
        ("vit_tiny_patch16_224:img_size=96,in_chans=1", None, (1, 96, 96)),
        ("resnet10t", None, (3, 176, 176)),
        ("resnet10t", (40, 40), (3, 40, 40)),
        ("sret_t_unsliced_384", None, (3, 384, 384)),
    ],
)
def test_images_have_the_requested_size_or_the_model_s_own(name, size, expected):
    assert make_subject(name, name, 1, size, CPU).images.shape[1:] == expected


def test_files_of_weights_and_of_export_can_be_compared(tmp_path):
    model = small_model()
    preprocessing = Preprocessing(img_size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3)
    card = Card(config=model.config, preprocessing=preprocessing)
    save_weights(tmp_path / "m.safetensors", model.state_dict(), card)
    exported = Exported(lambda x: np.zeros((len(x), 10), np.float32), card, "OpenVINO", "int8")
    for order in ((0, 1), (1, 0)):
        sources = [("m", str(tmp_path / "m.safetensors")), ("x", exported)]
        report = bench(dict(sources[i] for i in order), quick())
        assert [row.model for row in report.rows] == [sources[i][0] for i in order]
        row = next(row for row in report.rows if row.model == "x")
        assert (row.engine, row.dtype, row.difference) == ("openvino", "int8", None)
        assert row.gmacs == model_cost(model.config).macs / 1e9
        assert " - " in report.to_text()
    with pytest.raises(InputError, match="nothing to compare: x openvino int8: training needs eager or compile"):
        bench({"x": exported}, quick(is_training=True))


@pytest.mark.parametrize("is_training", [False, True])
def test_the_random_state_is_as_before(is_training):
    model = small_model()
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    bench({"a": model}, quick(is_training=is_training))
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize(
    "words", ["[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", "std::bad_alloc"]
)
@pytest.mark.usefixtures("never_timed")
def test_too_large_a_batch_is_one_line_with_advice(words):
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 1:
                raise RuntimeError(words)
            return x.mean((2, 3))

    with pytest.raises(
        InputError, match=r"large eager float32: .* does not fit in memory; try a smaller --batch_size$"
    ):
        bench({"large": Large()}, quick())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing MODEL"),
        (["sret_tt"], "no model 'sret_tt': give a model of timm or a weights file; did you mean 'sret_t'?"),
        (["gone.safetensors"], "gone.safetensors: no such file"),
        (["sret_t:permutation=stridid"], "permutation is 'stridid'; it must be one of random, strided"),
        (["sret_t:permutatio=strided"], "did you mean 'permutation'?"),
        (["sret_t:strided"], "write options as sret_t:name=value"),
        (["sret_t:img_size=64", "--img-size", "64"], "give img_size or --img-size, not both"),
        (["resnet10t:foo=3"], "resnet10t:foo=3: "),
        (["resnet10t:features_only=true"], "does not return logits"),
        (["sret_t", "--img-size", "8"], "stage 1 at 8x8 pixels"),
        (["sret_t:img_size=32", "--batch-size", 2 * 10**9], "does not fit in memory"),
        (["sret_t", "--engines", "eager,fast"], "engines is 'fast'; it must be one of eager, fused"),
        (["sret_t", "--dtype", "bfloat"], "dtypes is 'bfloat'; it must be one of float32, bfloat16, float16"),
        (["sret_t", "--rounds", "0"], "rounds"),
        (["sret_t", "--engines", "cudagraphs"], "needs --device cuda"),
    ],
)
@pytest.mark.usefixtures("never_timed")
def test_wrong_input_is_one_line(arguments, message, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("sret: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_extra(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, _, err = command("sret_t", "--img-size=32", "--engines=onnxruntime", "--batch-size=1")
    assert code == 2
    assert "pip install 'sret[export]'" in err


# the report ----------------------------------------------------------------------------------------------------------


def test_the_report_is_computed_from_the_times():
    seconds = {
        ("a", "eager"): (0.1, 0.2, 0.3),
        ("b", "eager"): (0.2, 0.2, 0.2),
        ("a", "fused"): (0.05, 0.05, 0.09),
        ("b", "fused"): (0.1, 0.1, 0.09),
    }
    rows = tuple(Row(name, engine, "float32", "64x64", 0.5, 0.0, times) for (name, engine), times in seconds.items())
    about = {"mode": "inference", "batch_size": 2, "peak_gflops": {"float32": 100}}
    a, b, fused_a, fused_b = Report(about, rows, ()).values()
    assert (a["ms_per_image"], a["ms_quartiles"], a["iqr_percent"]) == (
        100,
        pytest.approx((75, 125)),
        pytest.approx(50),
    )
    assert (b["vs_first"], b["vs_first_model"]) == (1, 1)
    assert fused_a["vs_first"] == pytest.approx(0.3)
    assert fused_b["vs_first"] == pytest.approx(0.5)
    assert (fused_a["vs_first_model"], fused_b["vs_first_model"]) == (1, 2)
    assert a["percent_of_peak"] == pytest.approx(100 * 2 * 0.5 * 2 / 0.2 / 100)
    training = Report({**about, "mode": "training"}, rows, ()).values()
    assert training[0]["percent_of_peak"] == pytest.approx(3 * a["percent_of_peak"])


def test_on_a_gpu_the_report_says_which_kernels_a_model_uses():
    sources = {"ours": SReT(small_config()), "theirs": timm.create_model("resnet10t")}
    subjects = {n: make_subject(n, model, 1, (64, 64), torch.device("cpu")) for n, model in sources.items()}
    paths = runner.gpu_paths(subjects)
    assert list(paths) == ["ours"]
    about = {"batch_size": 1, "mode": "inference", "peak_gflops": {"float32": 1}, "gpu_paths": paths}
    row = Row("ours", "eager", "float32", "64x64", 0.1, 0.0, (1.0, 1.0))
    report = Report(about, (row,), ())
    assert report.to_text().splitlines()[-1] == f"ours: {paths['ours']}"
    assert "SRET_TRITON=1" in json.loads(report.to_json())["gpu_paths"]["ours"]


def test_the_table_has_the_numbers_of_the_line_of_json(command):
    line = ("sret_t", "resnet10t", "resnet10t", "--img-size", 32, "--batch-size", 1, "--rounds", 2)
    code, out, err = command(*line, "--engines", "eager,fused")
    assert (code, err) == (0, "")
    *text, last = out.splitlines()
    values = json.loads(last)
    assert (values["benchmark"], values["batch_size"], values["threads"]) == ("bench", 1, torch.get_num_threads())
    shown = [line.split() for line in text if re.match("  [a-z]", line)]
    names = ["sret_t", "resnet10t", "resnet10t (2)", "sret_t"]
    assert [row["model"] for row in values["rows"]] == names
    for row, cells in zip(values["rows"], shown, strict=True):
        pixels, ms, iqr, first, model, gmacs, percent, difference = cells[len(row["model"].split()) :]
        assert pixels == row["pixels"] == "32x32"
        assert float(ms) == pytest.approx(row["ms_per_image"], abs=6e-4)
        assert float(iqr) == pytest.approx(row["iqr_percent"], abs=0.06)
        assert float(first) == pytest.approx(row["vs_first"], abs=6e-3)
        assert float(model) == pytest.approx(row["vs_first_model"], abs=6e-3)
        assert float(gmacs) == pytest.approx(row["gmacs"], abs=6e-4)
        assert float(percent) == pytest.approx(row["percent_of_peak"], abs=0.06)
        assert float(difference) == pytest.approx(row["difference"], rel=0.1)
        assert "seconds" not in row
    assert values["rows"][0]["gmacs"] == pytest.approx(model_cost(CONFIGS["sret_t"], (32, 32)).macs / 1e9, rel=1e-5)
    assert [reason.partition(": ")[2] for reason in values["left_out"]] == ["only models of sret can be fused"] * 2
    assert max(map(len, text)) <= 120


def test_with_json_the_command_prints_one_line(command):
    code, out, _ = command("test_vit", "--batch-size", 1, "--rounds", 1, "--json")
    assert code == 0
    assert out.count("\n") == 1
    assert json.loads(out)["rows"][0]["dtype"] in DTYPES


# scripts of benchmarks/ ----------------------------------------------------------------------------------------------


def test_the_figure_is_drawn_from_the_line_of_json(tmp_path):
    report = bench({"sret": small_model(), "other": "test_vit"}, quick(engines=("eager", "fused")))
    performance_figure.draw(json.loads(report.to_json()), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


class Hungry(nn.Module):
    """Allocates 96 MiB, and frees them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) + torch.ones(24 * 2**20).mean()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_is_what_a_call_allocates():
    peak = memory.peak_mib(Hungry, "eager", "float32", batch_size=1, size=None, device="cpu", train=False)
    assert peak == pytest.approx(96, abs=3)
