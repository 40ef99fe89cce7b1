"""Downloads published checkpoints from the authors' public Drive ids, once."""

import textwrap
from pathlib import Path
from urllib.parse import urlsplit

import torch

from sret.checkpoints.files import read_pickle
from sret.errors import InputError
from sret.files import replacing
from sret.models.variants import RELEASES
from sret.network import is_unreachable


def drive_url(drive_id: str) -> str:
    """The address of a public Drive file."""
    return f"https://drive.google.com/uc?id={drive_id}"


def is_drive_url(url: object) -> bool:
    """Whether an address is one that `drive_url` makes."""
    return isinstance(url, str) and url.startswith(drive_url(""))


def checkpoint_dir() -> Path:
    """The folder of downloaded files: in torch's hub directory, as timm's are."""
    return Path(torch.hub.get_dir()) / "checkpoints" / "sret"


def fetch(url: str) -> Path:
    """The local copy of a published checkpoint, downloaded on first use.

    Raises `InputError` saying how to do it by hand if the download fails; a partial download leaves nothing behind.
    """
    import gdown

    drive_id = url.removeprefix(drive_url(""))
    name = next((name for name, release in RELEASES.items() if release.drive_id == drive_id), drive_id)
    path = checkpoint_dir() / f"{name}.pth"
    if path.is_file():
        return path
    try:
        with replacing(path) as partial:
            gdown.download(url=url, output=str(partial), quiet=False)
            read_pickle(partial)  # when a quota is exceeded, Drive sends a web page: do not cache that
    except Exception as error:
        host = urlsplit(url).hostname
        reason = f"no connection to {host}" if is_unreachable(error) else textwrap.shorten(str(error), 200)
        raise InputError(
            f"could not download {name}: {reason.rstrip('.')}; download {url} in a browser, and give the file's path "
            f"instead of the name, or move it to {path}"
        ) from error
    return path
