"""Processes that load images."""

import multiprocessing
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from sret.data.workers import LONGEST_TEMPORARY, worker_options


def test_images_arrive_although_the_name_of_the_temporary_folder_is_long(short_path, monkeypatch):
    """The path of a socket has at most 103 characters. With a longer one, images were lost and training hung."""
    for length in (LONGEST_TEMPORARY, 200):
        folder = short_path / ("x" * (length - len(str(short_path)) - 1))
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)
        images = torch.arange(4.0)
        loader = DataLoader(TensorDataset(images), **worker_options(1), timeout=60)
        assert torch.cat([batch for (batch,) in loader]).equal(images)
        sockets = Path(multiprocessing.current_process()._config["tempdir"])
        assert (sockets.parent == folder) == (length == LONGEST_TEMPORARY)
        assert tempfile.gettempdir() == str(folder)
