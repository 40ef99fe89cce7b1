"""The batches of a training run, and the loaders of its images."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch.utils.data import DataLoader

from sret.data.dataset import Samples
from sret.data.loading import ImageDataset, TrainDataset, check_batch
from sret.data.on_device.loaders import CropLoader, DeviceLoader, fit_on_device
from sret.data.sampler import EpochBatches, balanced_uses
from sret.data.workers import worker_options
from sret.errors import InputWarning, plural
from sret.signals import leave_process_group
from sret.training.config import RuntimeConfig, TrainConfig

MAX_IMBALANCE = 5  # images of the largest class over those of the smallest; more cause a warning
MAX_UNUSED_SHARE = 0.2  # of the images, in an epoch; more cause a warning
TrainLoader = DataLoader[Any] | DeviceLoader | CropLoader


def make_batches(
    labels: Sequence[int], config: TrainConfig, runtime: RuntimeConfig, accelerator: Accelerator
) -> EpochBatches:
    """The batches of this process in an epoch.

    Warns if an epoch leaves out many of the images, and if classes are very unequal and not balanced.
    """
    num_images = len(labels)
    batches = EpochBatches(
        num_images,
        config.batch_size,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
        runtime.grad_accum_steps,
        balanced_uses(labels, config.class_balance),
    )
    if (left := num_images - batches.steps * config.batch_size) > MAX_UNUSED_SHARE * num_images:
        steps = f"{batches.steps} {plural('step', batches.steps)} of batch_size {config.batch_size}"
        text = f"an epoch is {steps} and leaves out {left} of {num_images} images, others in each epoch; "
        text += "a smaller batch_size leaves out fewer"
        warnings.warn(text, InputWarning, stacklevel=4)  # at the call of `train`
    counts = np.unique(np.asarray(labels), return_counts=True)[1]
    if counts.max() > MAX_IMBALANCE * counts.min() and not config.class_balance:
        text = f"classes have {counts.min():,} to {counts.max():,} training images, so the largest ones decide most of "
        text += "the loss; --class_balance 1 (or 0.5, for a part of it) draws images of small classes more often"
        warnings.warn(text, InputWarning, stacklevel=4)
    return batches


def make_loaders(
    train_set: TrainDataset,
    val_samples: Samples,
    batches: EpochBatches,
    config: TrainConfig,
    runtime: RuntimeConfig,
    accelerator: Accelerator,
) -> tuple[TrainLoader, DataLoader[Any]]:
    """Loaders of the training images, in the order of `batches`, and of the validation images."""
    loading: dict[str, Any] = {
        **worker_options(runtime.num_workers),
        "pin_memory": accelerator.device.type == "cuda",
        "worker_init_fn": leave_process_group,
    }
    val_batch_size = max(1, batches.batch_size // accelerator.num_processes)
    check_batch(train_set.preprocessing, val_batch_size // batches.accumulation, len(train_set))
    val_set, augmentation = ImageDataset(val_samples, train_set.preprocessing), config.augmentation
    val_loader = accelerator.prepare(DataLoader(val_set, val_batch_size, **loading))
    samples, preprocessing, device = train_set.samples, train_set.preprocessing, accelerator.device
    if augmentation.on_device and fit_on_device(samples, preprocessing, augmentation):
        return DeviceLoader(samples, preprocessing, augmentation, batches, device), val_loader
    workers = {"persistent_workers": runtime.num_workers > 0, **loading}
    loader = DataLoader(train_set, batch_sampler=batches, **workers)
    return CropLoader(loader, augmentation, batches, device) if augmentation.on_device else loader, val_loader
