"""Versions of the package, of torch and Python, and the commit."""

import platform
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
