"""Options for the processes that load images."""

from multiprocessing import util
from typing import Any


def worker_options(num_workers: int) -> dict[str, Any]:
    """What a `DataLoader` needs to load in that many processes."""
    if num_workers:
        # Their sockets lie in a temporary folder. Made here, they inherit it, and this process removes it at its exit;
        # a folder of their own would stay when one of them is killed.
        util.get_temp_dir()
    return {"num_workers": num_workers}
