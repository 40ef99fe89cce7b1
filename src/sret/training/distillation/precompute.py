"""Fast distillation, first part: stores a teacher's predictions for crops of every training image, in shards.

A shard is written completely or not at all, with a checksum, so that an interrupted pass continues where it stopped.
`sret.training.distillation.soft_labels` defines the content of a shard, and reads it.
Letters: C channels, R crops of an image.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop

from sret.checkpoints.files import CHECKSUM_KEY, checksum
from sret.data.dataset import Samples, check_output_dir
from sret.data.loading import Unreadable, check_batch
from sret.data.preprocess import Preprocessing
from sret.data.sampler import seeded
from sret.data.sources import load_data
from sret.data.workers import worker_options
from sret.errors import InputError, describe_changes, first_few
from sret.files import write_atomically
from sret.ranges import PositiveInt, Share, check_number
from sret.training.distillation.config import Distillation
from sret.training.distillation.soft_labels import (
    MANIFEST,
    Manifest,
    crop_image,
    is_intact,
    read_manifest,
    shard_path,
)
from sret.training.distillation.teacher import load_teacher, soft_predictions
from sret.training.distributed import raise_together

ASPECT_RATIOS = (3 / 4, 4 / 3)  # of crops, as in torchvision and timm


class CropDataset(Dataset[tuple[Tensor, Tensor, Tensor, str]]):
    """Image i as R crops for a teacher: (R, C, H, W), crops (R, 4), flips (R), error if it could not be read."""

    def __init__(self, samples: Samples, preprocessing: Preprocessing, manifest: Manifest) -> None:
        self.samples, self.preprocessing, self.manifest = samples, preprocessing, manifest

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, str]:
        crops = torch.zeros(self.manifest.crops, 4, dtype=torch.int32)
        flips = torch.zeros(self.manifest.crops, dtype=torch.uint8)
        images = torch.zeros(self.manifest.crops, len(self.preprocessing.mean), *self.preprocessing.img_size)
        try:
            image = self.preprocessing.load(self.samples.images[index])
        except InputError as error:
            return images, crops, flips, str(error)
        for r in range(self.manifest.crops):
            with seeded((self.manifest.seed, index, r)):
                crop = RandomResizedCrop.get_params(image, [self.manifest.min_scale, 1.0], list(ASPECT_RATIOS))
                is_mirrored = bool(torch.rand(()) < 0.5)
            images[r] = crop_image(image, crop, is_mirrored, self.preprocessing)
            crops[r], flips[r] = torch.tensor(crop), is_mirrored
        return images, crops, flips, ""


@torch.no_grad()
def write_soft_labels(
    out: Path,
    data_name: str,
    distillation: Distillation,
    crops: int = 4,
    top_k: int = 10,
    min_scale: float = 0.08,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
    max_corrupt: int = 0,
) -> Iterator[tuple[int, int]]:
    """Writes the soft labels of a data set's training split to `out`; yields (shards done, shards).

    Keeps intact shards of the same manifest. Several processes divide the shards: each counts its own, and all return
    when the last one is done.

    Raises `InputError` if `out` was started with other settings, and for data or a teacher that cannot be loaded.
    """
    accelerator = Accelerator()
    check_output_dir(out, data_name)
    data = load_data(data_name)
    samples = data.split("train")
    check_number("crops", crops, PositiveInt)
    check_number("top_k", top_k, PositiveInt)
    check_number("min_scale", min_scale, Share)
    top_k = min(top_k, len(data.class_names))
    model, preprocessing = load_teacher(distillation.teacher, distillation.teacher_weights, data.class_names)
    manifest = Manifest(
        data=data.name,
        fingerprint=data.fingerprint(),
        num_samples=len(samples),
        distillation=json.loads(json.dumps(asdict(distillation), default=str)),
        teacher_digest=checksum(model.state_dict()),
        crops=crops,
        top_k=top_k,
        min_scale=min_scale,
        seed=seed,
    )
    check_batch(preprocessing, max(batch_size, crops), len(samples) * crops)
    raise_together(_claim(out, manifest) if accelerator.is_main_process else None)
    model = model.eval().to(accelerator.device)
    dataset, unreadable = CropDataset(samples, preprocessing, manifest), Unreadable(max_corrupt)
    label = partial(_labels, model, dataset, unreadable, batch_size, num_workers)
    mine = range(accelerator.process_index, manifest.num_shards, accelerator.num_processes)
    for done, shard in enumerate(mine):
        path = shard_path(out, shard)
        if not is_intact(out, shard, manifest):
            tensors = label(shard)
            write_atomically(path, save(tensors, metadata={CHECKSUM_KEY: checksum(tensors)}))
        yield done + 1, len(mine)
    accelerator.wait_for_everyone()


def _labels(
    model: nn.Module, dataset: CropDataset, unreadable: Unreadable, batch_size: int, num_workers: int, shard: int
) -> dict[str, Tensor]:
    """The tensors of one shard: what the teacher predicts for the crops of its images."""
    manifest, preprocessing = dataset.manifest, dataset.preprocessing
    device = next(model.parameters()).device
    first = shard * manifest.shard_size
    indices = range(first, min(first + manifest.shard_size, len(dataset)))
    parts: dict[str, list[Tensor]] = {"crops": [], "flips": [], "classes": [], "probabilities": []}
    loader = DataLoader(dataset, max(1, batch_size // manifest.crops), sampler=indices, **worker_options(num_workers))
    for images, boxes, flips, errors in loader:
        unreadable.add(errors)
        images = preprocessing.normalize(images.flatten(0, 1).to(device))
        top = soft_predictions(model, images, manifest.distillation["temperature"]).topk(manifest.top_k)
        for name, tensor in {"classes": top.indices.int(), "probabilities": top.values.half()}.items():
            parts[name].append(tensor.cpu().unflatten(0, (-1, manifest.crops)))
        parts["crops"].append(boxes)
        parts["flips"].append(flips)
    return {name: torch.cat(part).contiguous() for name, part in parts.items()}


def _claim(out: Path, manifest: Manifest) -> str | None:
    """Writes the manifest to the folder; returns an error message if the folder belongs to something else."""
    path, values = out / MANIFEST, json.loads(json.dumps(asdict(manifest)))
    try:
        if path.exists():
            found = describe_changes(asdict(read_manifest(out)), values)
            return f"{out} was started with other settings: {first_few(found)}; choose another --out" if found else None
        if out.exists() and (not out.is_dir() or any(file.name[0] != "." for file in out.iterdir())):
            return f"{out} already has other files; choose another --out"
        write_atomically(path, json.dumps(values, indent=1).encode())
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"{out}: cannot be written to ({error.strerror or error})"
    return None
