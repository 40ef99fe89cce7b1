"""Chooses what a recipe trains on: the labels of the data, a teacher's predictions, or stored soft labels."""

import torch

from sret.data.dataset import ImageData
from sret.data.loading import TrainDataset
from sret.data.preprocess import Preprocessing
from sret.training.config import TrainConfig
from sret.training.distillation.soft_labels import SoftLabelDataset, read_manifest
from sret.training.distillation.teacher import Teacher, load_teacher


def temperature_of(config: TrainConfig) -> float:
    """The temperature of the student's logits; 1 without a teacher."""
    if config.soft_labels is not None:
        return float(read_manifest(config.soft_labels).distillation["temperature"])
    return config.distillation.temperature if config.distillation else 1.0


def training_set(config: TrainConfig, data: ImageData, preprocessing: Preprocessing, max_corrupt: int) -> TrainDataset:
    """The training images, with the labels of the data or with stored soft labels."""
    if config.soft_labels is not None:
        return SoftLabelDataset(config.soft_labels, data, preprocessing, max_corrupt)
    return TrainDataset(data.split("train"), preprocessing, config.augmentation, config.seed, max_corrupt)


def make_teacher(config: TrainConfig, data: ImageData, device: torch.device) -> Teacher | None:
    """The recipe's teacher, for images of the data, on a device; None if it has none."""
    if config.distillation is None:
        return None
    wanted = config.distillation
    model, own = load_teacher(wanted.teacher, wanted.teacher_weights, data.class_names)
    return Teacher(model, own, data.in_chans, wanted.temperature).to(device)
