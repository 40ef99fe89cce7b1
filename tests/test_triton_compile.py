"""Every Triton kernel compiles for GPUs that are not here, without spills and within their shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.slow

SHARED = 99 * 1024  # bytes a program can use on the smallest GPU of compute capability 8 or more
# Products of fewer than 64 rows take the older instructions on sm_90.
WITH_WGMMA = ("64", "128")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("channels", ["16 32", "64", "128", "256", "512"])
def test_kernels_compile_without_spills(capability, channels):
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists():
        pytest.skip("this build of Triton has no cuobjdump")
    command = [sys.executable, Path(__file__).with_name("triton_offline.py"), str(capability), "bfloat16"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, *channels.split()], env=environment, capture_output=True, text=True, timeout=900, check=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 11 * len(channels.split())
    assert [row for row in rows if row["stack"] or row["shared"] > SHARED] == []
    if capability == 90 and channels in WITH_WGMMA:
        assert [row["kernel"] for row in rows if not row["wgmma"] and "_attend" not in row["kernel"]] == []
