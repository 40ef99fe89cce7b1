"""Fast distillation: a teacher answers once for R crops of every picture, and training replays crops and answers.

Source: Shen, Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022, arXiv:2112.01528,
written anew: of each answer the k likeliest classes are kept, and what they leave is shared by the other classes alike
(the paper's marginal smoothing).

A folder holds `manifest.json` and shards of 1,000 pictures each, `labels-00000.safetensors` and so on:

    crops          (n, R, 4) int32    top, left, height, width, in pixels of the picture as it is
    flips          (n, R)    uint8    1 where the crop is mirrored
    classes        (n, R, k) int32
    probabilities  (n, R, k) float16

Each shard is written whole or not at all and knows its checksum, so that an interrupted pass goes on where it stopped.
Letters: K classes, R crops of a picture, k classes kept.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import hflip, normalize, resized_crop, to_tensor

from sret.checkpoint import write_atomically
from sret.data import ImageData, Samples, TrainDataset, Unreadable
from sret.distill import load_teacher
from sret.errors import InputError, some
from sret.preprocess import Preprocessing
from sret.recipe import Distillation, changes
from sret.sampling import Draw, seeded
from sret.sources import load_data

SHARD_SIZE = 1000  # pictures
MANIFEST = "manifest.json"
ASPECT_RATIOS = (3 / 4, 4 / 3)  # of crops, as torchvision and timm have it

Crop = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of soft labels is about.

    Attributes:
        data: name of the data; fingerprint: its `ImageData.fingerprint`. The labels are of its training split.
        distillation: teacher and temperature.
        crops: R; top_k: k; min_scale: smallest share of a picture that a crop covers.
    """

    data: str
    fingerprint: dict[str, Any]
    num_samples: int
    distillation: dict[str, Any]
    crops: int
    top_k: int
    min_scale: float
    seed: int
    shard_size: int = SHARD_SIZE

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.shard_size)


def shard_path(folder: Path, shard: int) -> Path:
    """The file that holds shard number `shard`, from 0."""
    return folder / f"labels-{shard:05d}.safetensors"


# writing -------------------------------------------------------------------------------------------------------------


class CropDataset(Dataset[tuple[Tensor, Tensor, Tensor, str]]):
    """Picture i as R crops for a teacher: (R, C, H, W), crops (R, 4), flips (R), what could not be read."""

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
            images[r] = cut(image, crop, is_mirrored, self.preprocessing)
            crops[r], flips[r] = torch.tensor(crop), is_mirrored
        return images, crops, flips, ""


def cut(image: Image.Image, crop: Crop, is_mirrored: bool, preprocessing: Preprocessing) -> Tensor:
    """A crop of a PIL image, resized and normalised: (C, H, W)."""
    top, left, height, width = crop
    mode = InterpolationMode(preprocessing.interpolation)
    image = resized_crop(image, top, left, height, width, list(preprocessing.img_size), mode)
    tensor = to_tensor(hflip(image) if is_mirrored else image)
    return normalize(tensor, list(preprocessing.mean), list(preprocessing.std))


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
    """Writes the soft labels of a data set's training split to `out`; yields (shards done, shards) as it goes.

    Shards that are there already, whole and of the same manifest, are kept. Several processes share the shards.

    Raises `InputError` if `out` was begun with other settings, and for whatever data and teacher cannot be.
    """
    data = load_data(data_name)
    samples = data.split("train")
    for name, value, most in (("crops", crops, None), ("top_k", top_k, len(data.class_names))):
        if value < 1 or (most is not None and value > most):
            raise InputError(f"{name} is {value}; it must be at least 1{f' and at most {most}' if most else ''}")
    if not 0 < min_scale <= 1:
        raise InputError(f"min_scale is {min_scale}; it must be above 0 and at most 1")
    model, preprocessing = load_teacher(distillation.teacher, distillation.teacher_weights, data.class_names)
    manifest = Manifest(
        data=data.name,
        fingerprint=data.fingerprint(),
        num_samples=len(samples),
        distillation=json.loads(json.dumps(asdict(distillation), default=str)),
        crops=crops,
        top_k=top_k,
        min_scale=min_scale,
        seed=seed,
    )
    _claim(out, manifest)
    accelerator = Accelerator()
    model = model.eval().to(accelerator.device)
    dataset, unreadable = CropDataset(samples, preprocessing, manifest), Unreadable(max_corrupt)
    for shard in range(accelerator.process_index, manifest.num_shards, accelerator.num_processes):
        path = shard_path(out, shard)
        if not _is_whole(path):
            first = shard * manifest.shard_size
            indices = range(first, min(first + manifest.shard_size, len(samples)))
            parts: dict[str, list[Tensor]] = {"crops": [], "flips": [], "classes": [], "probabilities": []}
            loader = DataLoader(dataset, max(1, batch_size // crops), sampler=indices, num_workers=num_workers)
            for images, boxes, flips, errors in loader:
                unreadable.note(errors)
                logits = model(images.flatten(0, 1).to(accelerator.device)).float()
                top = (logits / distillation.temperature).softmax(dim=1).topk(top_k)
                answers = {"classes": top.indices.int(), "probabilities": top.values.half()}
                for name, tensor in answers.items():
                    parts[name].append(tensor.cpu().unflatten(0, (len(images), crops)))
                parts["crops"].append(boxes)
                parts["flips"].append(flips)
            tensors = {name: torch.cat(part).contiguous() for name, part in parts.items()}
            write_atomically(path, save(tensors, metadata={"sha256": _checksum(tensors)}))
        yield shard + 1, manifest.num_shards


def _claim(out: Path, manifest: Manifest) -> None:
    path = out / MANIFEST
    if path.exists():
        if found := changes(asdict(read_manifest(out)), json.loads(json.dumps(asdict(manifest)))):
            raise InputError(f"{out} was begun with other settings: {some(found)}; name another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} holds something else already; name another --out")
    else:
        write_atomically(path, json.dumps(asdict(manifest), indent=1).encode())


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("sha256") == _checksum(load_file(path))
    except (OSError, SafetensorError):
        return False


# replaying -----------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """Raises `InputError` for a folder without soft labels, or with those of another version."""
    try:
        return Manifest(**json.loads((folder / MANIFEST).read_text()))
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no soft labels; `sret soft-labels` writes them") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / MANIFEST} is damaged, or of another version of sret") from error


class ReplayDataset(TrainDataset):
    """Pictures cropped as the teacher saw them, with its answers: (tensor, (K,) probabilities, unreadable ones).

    Epoch e takes crop number e mod R of each picture.

    Raises `InputError` for labels of other data, and for shards that are missing or damaged.
    """

    def __init__(self, folder: Path, data: ImageData, preprocessing: Preprocessing, max_corrupt: int = 0) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        self.samples, self.preprocessing, self.max_corrupt = data.split("train"), preprocessing, max_corrupt
        self.num_classes = len(data.class_names)
        if found := changes(self.manifest.fingerprint, data.fingerprint()):
            raise InputError(f"{folder} holds soft labels of other data than {data.name}: {some(found)}")
        paths = [shard_path(folder, shard) for shard in range(self.manifest.num_shards)]
        if missing := [path.name for path in paths if not path.exists()]:
            raise InputError(
                f"{folder}: the pass of the teacher is not finished, {len(missing)} of {len(paths)} shards are "
                f"missing ({some(missing)}); the same `sret soft-labels` goes on"
            )
        if damaged := [path.name for path in paths if not _is_whole(path)]:
            raise InputError(f"{folder}: damaged: {some(damaged)}; the same `sret soft-labels` writes them anew")

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor, str]:  # type: ignore[override]
        for index, image, errors in self.readable_from(draw.picture):
            crop, is_mirrored, target = self.label(index, draw.epoch % self.manifest.crops)
            return cut(image, crop, is_mirrored, self.preprocessing), target, errors
        raise AssertionError("readable_from yields or raises")

    def label(self, index: int, r: int) -> tuple[Crop, bool, Tensor]:
        """Crop number r of a picture, whether it is mirrored, and the teacher's answer as (K,) probabilities."""
        shard, row = divmod(index, self.manifest.shard_size)
        file = _open(shard_path(self.folder, shard))
        crops, flips, classes, probabilities = (
            file.get_slice(name)[row : row + 1][0, r] for name in ("crops", "flips", "classes", "probabilities")
        )
        kept = probabilities.float()
        others = self.num_classes - len(kept)
        rest = (1 - kept.sum()).clamp(min=0) / others if others else torch.zeros(())
        target = rest.expand(self.num_classes).scatter(0, classes.long(), kept)
        top, left, height, width = crops.tolist()
        return (top, left, height, width), bool(flips), target / target.sum()


@cache  # per process: files stay mapped, and the page cache does the rest
def _open(path: Path) -> Any:
    return safe_open(path, "pt").__enter__()
