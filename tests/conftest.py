"""Small models and settings shared by the tests."""

import os
import shutil
from collections.abc import Iterator
from multiprocessing import util
from pathlib import Path
from tempfile import mkdtemp

if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: test_triton.py runs the kernels on the CPU

import processes
import pytest
import torch

from sret import ModelConfig, SReT, StageConfig

DATA = Path(__file__).parent / "data"


def pytest_xdist_auto_num_workers() -> int | None:
    """As many as this process may use cores; xdist would count the cores of the machine, also in a small container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Nothing outlasts the tests, not even the processes of a test that hung, which pytest ends at once."""
    if not hasattr(session.config, "workerinput"):  # a process of xdist: the tests of the others go on
        processes.kill_marked(os.environ[processes.MARK])


def small_config(**changes: object) -> ModelConfig:
    """Three narrow stages for 64-pixel images with slices in both passes of two of them."""
    stages = tuple(
        StageConfig(embed_dim=8 * heads, num_heads=heads, num_blocks=blocks, groups=groups, mlp_ratio=2.0)
        for heads, blocks, groups in ((2, 1, (8, 2)), (4, 2, (4, 2)), (8, 1, (1, 1)))
    )
    return ModelConfig(**{"stages": stages, "img_size": 64, "num_classes": 10, **changes})


def pytest_collectstart(collector: pytest.Collector) -> None:
    """The images that a module draws when it is imported are the same in every run."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """So are those of the fixtures that several tests share, whichever test asks first. `_seed` comes after them."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def config() -> ModelConfig:
    return small_config()


@pytest.fixture
def model(config: ModelConfig) -> SReT:
    return SReT(config).eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64)


@pytest.fixture
def short_path() -> Path:
    """Like `tmp_path`, short enough for sockets in it. Removed at exit, after the folder that multiprocessing makes."""
    folder = Path(mkdtemp(dir="/tmp"))
    util.Finalize(None, shutil.rmtree, args=(folder,), kwargs={"ignore_errors": True}, exitpriority=-1000)
    return folder


@pytest.fixture(scope="module")
def quick_report() -> Iterator[None]:
    """Runs end with an empty file for a report: drawing one takes as long as the training. test_report.py draws it."""
    from sret.training import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_png", lambda path, *_: path.write_bytes(b""))
        yield
