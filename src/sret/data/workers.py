"""Sets up the processes that load images: options of `DataLoader`, and a folder for their sockets."""

import os
import tempfile
from multiprocessing import util
from typing import Any

# Characters of the folder in which multiprocessing makes its sockets. With the names in it a path has at most 103.
LONGEST_TEMPORARY = 70


def worker_options(num_workers: int) -> dict[str, Any]:
    """What a `DataLoader` needs to load in that many processes."""
    if num_workers:
        _make_socket_folder()
    return {"num_workers": num_workers}


def _make_socket_folder() -> None:
    """Makes one folder for the sockets of all loading processes, which this process removes at its exit.

    Folders of their own would stay when they are killed. In a folder with a long path no socket can be made; images
    would be lost, and the command would wait forever. (Python 3.14 also uses /tmp then.)
    """
    before = tempfile.tempdir
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TEMPORARY:
        tempfile.tempdir = "/tmp"
    try:
        util.get_temp_dir()
    finally:
        tempfile.tempdir = before
