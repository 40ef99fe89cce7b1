"""Measures a training step with stored soft labels, with an online teacher, and with the labels of the data.

    python benchmarks/distillation.py --images FOLDER [--student sret_t] [--teacher regnety_160] [--batch-size 16]

The three candidates alternate in one process. A step loads and crops its images in the same process, computes the
teacher's predictions if the teacher is online, and trains the student: forward, backward, AdamW. Before the measurement
the stored predictions are compared with the teacher's. Weights are random, which does not change the time. The images
are real files.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.loss import SoftTargetCrossEntropy

from sret.data.config import Augmentation
from sret.data.image_files import image_suffixes
from sret.data.loading import TrainDataset
from sret.data.sampler import SampleIndex
from sret.data.sources import load_data
from sret.models.build import build
from sret.training.config import TrainConfig
from sret.training.distillation.config import Distillation
from sret.training.distillation.precompute import write_soft_labels
from sret.training.distillation.soft_labels import MANIFEST, SoftLabelDataset
from sret.training.distillation.teacher import Teacher, load_teacher, soft_targets
from sret.training.setup import fitting_model
from sret.version import versions

CROPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of images, also in sub-folders")
    parser.add_argument("--student", default="sret_t")
    parser.add_argument("--teacher", default="regnety_160", help="a model of timm")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    device = torch.device(options.device)
    files = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in image_suffixes())
    for k, path in enumerate(files[: 4 * options.batch_size]):  # a data set needs two classes
        (folder / "data" / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        (folder / "data" / "ab"[k % 2] / f"{k}{path.suffix}").symlink_to(path.resolve())
    torch.manual_seed(0)
    save_file(timm.create_model(options.teacher, num_classes=2).state_dict(), folder / "teacher.safetensors")
    distillation = Distillation(teacher=options.teacher, teacher_weights=folder / "teacher.safetensors")

    started = time.perf_counter()
    name = str(folder / "data")
    list(write_soft_labels(folder / "labels", name, distillation, crops=CROPS, top_k=2, batch_size=options.batch_size))
    data = load_data(name)
    num_images = len(data.split("train"))
    labelling = (time.perf_counter() - started) / (CROPS * num_images)

    config = TrainConfig(model=options.student, data=name, batch_size=options.batch_size)
    student_config = fitting_model(config, data)
    preprocessing = data.preprocessing(student_config.input_size)
    model, own = load_teacher(options.teacher, distillation.teacher_weights, data.class_names)
    teacher = Teacher(model, own, 3, 1.0).to(device)
    cropped = TrainDataset(data.split("train"), preprocessing, Augmentation())
    stored_set = SoftLabelDataset(folder / "labels", data, preprocessing)
    check(stored_set, teacher, own == preprocessing, device)

    student = build(student_config).to(device).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    criterion = SoftTargetCrossEntropy()

    def step(dataset: TrainDataset, is_online: bool) -> None:
        items = [dataset[SampleIndex(i % num_images, 0)] for i in range(options.batch_size)]
        images = torch.stack([item[0] for item in items]).to(device)
        labels = torch.stack([torch.as_tensor(item[1]) for item in items]).to(device)
        targets = teacher(images) if is_online else soft_targets(labels, 2, 0.0)
        criterion(student(preprocessing.normalize(images)), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    candidates: dict[str, Callable[[], None]] = {
        "labels of the data": lambda: step(cropped, is_online=False),
        "teacher online": lambda: step(cropped, is_online=True),
        "stored predictions": lambda: step(stored_set, is_online=False),
    }
    seconds: dict[str, list[float]] = {candidate: [] for candidate in candidates}
    for turn in range(options.rounds + 1):
        for candidate, run in candidates.items():
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first one warms up
                seconds[candidate].append(time.perf_counter() - started)

    stored_bytes = sum(path.stat().st_size for path in (folder / "labels").iterdir() if path.name != MANIFEST)
    print(f"student {options.student}, teacher {options.teacher}, batch {options.batch_size}, float32, {device}")
    print(f"{versions()}, {platform.machine()}, {torch.get_num_threads()} threads, {os.cpu_count()} cores\n")
    print(f"{'a training step':<20} {'median s':>9} {'IQR s':>7} {'/ online':>10}")
    online = seconds["teacher online"]
    rows = {}
    for candidate, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4)
        ratio = statistics.median(a / b for a, b in zip(times, online, strict=True))
        rows[candidate] = {"median_s": median, "iqr_s": high - low, "of_online": ratio}
        print(f"{candidate:<20} {median:>9.3f} {high - low:>7.3f} {ratio:>10.2f}")
    saved = rows["teacher online"]["median_s"] - rows["stored predictions"]["median_s"]
    per_crop = {
        "labelling_s": labelling,
        "saved_s": saved / options.batch_size,
        "bytes": stored_bytes / CROPS / num_images,
    }
    uses = per_crop["labelling_s"] / per_crop["saved_s"]
    print(f"\nper crop: {labelling:.3f} s to compute its prediction once; {per_crop['bytes']:.0f} bytes on disk")
    print(f"each use saves {per_crop['saved_s']:.3f} s, so storing saves time from {uses:.1f} uses on")
    about = {"student": options.student, "teacher": options.teacher, "batch_size": options.batch_size}
    machine = {"device": str(device), "threads": torch.get_num_threads(), **versions()}
    print(json.dumps({"benchmark": "distillation", **about, **machine, "step": rows, "crop": per_crop}))


def check(stored: SoftLabelDataset, teacher: Teacher, is_same_view: bool, device: torch.device) -> None:
    """Stored predictions equal the teacher's for the same crops; at another size or normalisation nearly."""
    for i in range(3):
        image, target, _ = stored[SampleIndex(i, 0)]
        prediction = teacher(image[None].to(device))[0].cpu()
        torch.testing.assert_close(prediction, target, atol=2e-3 if is_same_view else 0.1, rtol=0)


if __name__ == "__main__":
    main()
