"""Fast distillation, second part: trains on crops of images with stored predictions of a teacher.

Source: Shen, Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022, arXiv:2112.01528. Of
each prediction the k most probable classes are stored, and the other classes share the rest equally (the paper's
marginal smoothing).

A folder holds `manifest.json` and shards of 1,000 images each, `labels-00000.safetensors` and so on, which
`sret.training.distillation.precompute` writes:

    crops          (n, R, 4) int32    top, left, height, width, in pixels of the original image; 0 if unreadable
    flips          (n, R)    uint8    1 if the crop is flipped horizontally
    classes        (n, R, k) int32
    probabilities  (n, R, k) float16

Letters: K classes, R crops of an image, k classes kept.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import hflip, resized_crop, to_tensor

from sret.checkpoints.files import CHECKSUM_KEY, read_safetensors
from sret.data.dataset import ImageData
from sret.data.loading import TrainDataset, blank_image
from sret.data.preprocess import Preprocessing
from sret.data.sampler import SampleIndex
from sret.errors import InputError, describe_changes, first_few, first_line
from sret.ranges import MAX_NUMBER, PositiveInt, Seed, Share, check_fields
from sret.training.distillation.config import Distillation

SHARD_SIZE = 1000  # images
MANIFEST = "manifest.json"

Crop = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The settings of a folder of soft labels.

    Attributes:
        data: name of the data; the labels are for its training split.
        fingerprint: of the data, by `ImageData.fingerprint`.
        num_samples: images of the training split.
        distillation: teacher and temperature.
        teacher_digest: SHA-256 of the teacher's weights.
        crops: R.
        top_k: k.
        min_scale: smallest share of an image's area that a crop covers.
        seed: of the crops.
        shard_size: images of each shard but the last.
    """

    data: str
    fingerprint: dict[str, Any]
    num_samples: PositiveInt
    distillation: dict[str, Any]
    teacher_digest: str
    crops: PositiveInt
    top_k: PositiveInt
    min_scale: Share
    seed: Seed
    shard_size: PositiveInt = SHARD_SIZE

    def __post_init__(self) -> None:
        check_fields(self)
        Distillation(**self.distillation)

    @property
    def num_shards(self) -> int:
        """Number of files with labels."""
        return -(-self.num_samples // self.shard_size)


def shard_path(folder: Path, shard: int) -> Path:
    """The file that holds shard number `shard`, from 0."""
    return folder / f"labels-{shard:05d}.safetensors"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises `InputError` if the folder has no soft labels, or those of another version."""
    if not (folder / MANIFEST).is_file():  # reading a pipe would block
        raise InputError(f"{folder}: no soft labels; `sret soft-labels` writes them")
    try:
        return Manifest(**json.loads((folder / MANIFEST).read_text()))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{folder / MANIFEST} is damaged, or of another version of sret ({first_line(error)})"
        ) from error


def is_intact(folder: Path, shard: int, manifest: Manifest) -> bool:
    """Whether a shard exists, its checksum is correct, and it holds what the manifest says."""
    try:
        tensors, metadata = read_safetensors(shard_path(folder, shard))
    except InputError:
        return False
    num_classes, count = len(manifest.fingerprint["class_names"]), manifest.num_samples - shard * manifest.shard_size
    rows = (min(count, manifest.shard_size), manifest.crops)
    expected = {
        "crops": (torch.int32, (*rows, 4), MAX_NUMBER),  # the size of an image is known when it is read
        "flips": (torch.uint8, rows, 1),
        "classes": (torch.int32, (*rows, manifest.top_k), num_classes - 1),
        "probabilities": (torch.float16, (*rows, manifest.top_k), 1),
    }
    return (
        CHECKSUM_KEY in metadata
        and {name: (x.dtype, x.shape) for name, x in tensors.items()}
        == {name: (dtype, shape) for name, (dtype, shape, _) in expected.items()}
        and all(((tensors[name] >= 0) & (tensors[name] <= highest)).all() for name, (*_, highest) in expected.items())
    )


def crop_image(image: Image.Image, crop: Crop, is_mirrored: bool, preprocessing: Preprocessing) -> Tensor:
    """A crop of a PIL image, resized: (C, H, W) in 0..1."""
    top, left, height, width = crop
    mode = InterpolationMode(preprocessing.interpolation)
    image = resized_crop(image, top, left, height, width, list(preprocessing.img_size), mode)
    return to_tensor(hflip(image) if is_mirrored else image)


class SoftLabelDataset(TrainDataset):
    """Images cropped as for the teacher, with its predictions: (image, (K,) probabilities, errors).

    Epoch e takes crop number e mod R of each image, and the next ones for further uses of an image in the epoch.

    Raises `InputError` for labels of other data, and for shards that are missing or damaged.
    """

    def __init__(self, folder: Path, data: ImageData, preprocessing: Preprocessing, max_corrupt: int = 0) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        self.samples, self.preprocessing, self.max_corrupt = data.split("train"), preprocessing, max_corrupt
        self.num_classes = len(data.class_names)
        self.files: dict[int, Any] = {}  # opened by each process, and kept mapped
        if found := describe_changes(self.manifest.fingerprint, data.fingerprint()):
            raise InputError(f"{folder} holds soft labels of other data than {data.name}: {first_few(found)}")
        if self.manifest.num_samples != len(self.samples) or self.manifest.top_k > self.num_classes:
            raise InputError(
                f"{folder / MANIFEST} is damaged: {self.manifest.top_k} classes of {self.manifest.num_samples} images, "
                f"but {data.name} has {self.num_classes} classes and {len(self.samples)} training images"
            )
        paths = [shard_path(folder, shard) for shard in range(self.manifest.num_shards)]
        if missing := [path.name for path in paths if not path.exists()]:
            raise InputError(
                f"{folder}: not complete, {len(missing)} of {len(paths)} shards are missing ({first_few(missing)}); "
                "run the same `sret soft-labels` again to continue"
            )
        intact = [is_intact(folder, shard, self.manifest) for shard in range(len(paths))]
        if damaged := [path.name for path, is_fine in zip(paths, intact, strict=True) if not is_fine]:
            raise InputError(
                f"{folder}: damaged: {first_few(damaged)}; run the same `sret soft-labels` again to replace them"
            )

    def fetch(self, index: int, sample: SampleIndex) -> tuple[Tensor, Tensor]:
        image = self.preprocessing.load(self.samples.images[index])
        crop, is_mirrored, target = self.label(index, (sample.epoch + sample.use) % self.manifest.crops)
        top, left, height, width = crop
        if not height or not width:
            raise InputError(f"{self.folder}: image {index} could not be read when its labels were made")
        if top + height > image.height or left + width > image.width:
            raise InputError(f"{self.folder}: a crop of image {index} is not inside it; was the image replaced?")
        return crop_image(image, crop, is_mirrored, self.preprocessing), target

    def blank(self) -> tuple[Tensor, Tensor]:
        return blank_image(self.preprocessing), torch.zeros(self.num_classes)

    def label(self, index: int, r: int) -> tuple[Crop, bool, Tensor]:
        """Crop number r of an image, whether it is flipped, and the teacher's (K,) probabilities."""
        shard, row = divmod(index, self.manifest.shard_size)
        if shard not in self.files:
            self.files[shard] = safe_open(shard_path(self.folder, shard), "pt").__enter__()
        crops, flips, classes, probabilities = (
            self.files[shard].get_slice(name)[row : row + 1][0, r]
            for name in ("crops", "flips", "classes", "probabilities")
        )
        kept = probabilities.float()
        others = self.num_classes - len(kept)
        rest = (1 - kept.sum()).clamp(min=0) / others if others else torch.zeros(())
        target = rest.expand(self.num_classes).scatter(0, classes.long(), kept)
        top, left, height, width = crops.tolist()
        return (top, left, height, width), bool(flips), target / target.sum()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}
