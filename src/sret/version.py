"""Versions of the package, of torch and Python, the commit, and the name of a device."""

import platform
import re
import subprocess
from pathlib import Path

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of sret, torch and Python, and the commit; the commit is empty outside a checkout of sret."""
    import torch

    here = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(here), "rev-parse", "--show-toplevel", "HEAD"]
        top, commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split("\n")[:2]
        commit = commit if Path(top).resolve() / "src" / "sret" == here else ""
    except (OSError, subprocess.CalledProcessError, ValueError):  # no git, no checkout, no commit yet
        commit = ""
    return {
        "sret": __version__,
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def device_name(kind: str) -> str:
    """The name of the GPU ("cuda") or of the processor ("cpu")."""
    import torch

    if kind == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
