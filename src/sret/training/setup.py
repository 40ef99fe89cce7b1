"""What a recipe asks for, made to fit its data: the model, how images are prepared, the targets."""

import torch

from sret.data.dataset import ImageData, TrainDataset
from sret.data.preprocess import Preprocessing
from sret.errors import InputError
from sret.models.config import ModelConfig
from sret.training.config import TrainConfig
from sret.training.distillation.soft_labels import ReplayDataset, read_manifest
from sret.training.distillation.teacher import Teacher, load_teacher


def fitting_model(config: TrainConfig, data: ImageData) -> ModelConfig:
    """The model of a recipe for a data set. Raises `InputError` if its classes or channels are not the data's."""
    if len(data.class_names) < 2:
        raise InputError(
            f"{data.name} has one class, {data.class_names[0]!r}, and nothing to tell it from; "
            "name the folder that holds a sub-folder per class"
        )
    wanted = config.model_config(len(data.class_names), data.in_chans)
    if wanted.num_classes != len(data.class_names):
        raise InputError(
            f"the model has {wanted.num_classes} classes, {data.name} has {len(data.class_names)}; "
            f"set model.num_classes to {len(data.class_names)}"
        )
    if wanted.in_chans != data.in_chans:
        raise InputError(
            f"the model takes {wanted.in_chans} channels, {data.name} has {data.in_chans}; "
            f"set model.in_chans to {data.in_chans}"
        )
    return wanted


def preprocessing_for(config: ModelConfig, data: ImageData) -> Preprocessing:
    """How images of a data set become inputs of a model."""
    return Preprocessing(img_size=config.input_size, mean=data.mean, std=data.std, crop_pct=data.crop_pct)


def temperature_of(config: TrainConfig) -> float:
    """What the student's logits are divided by: 1 without a teacher."""
    if config.soft_labels is not None:
        return float(read_manifest(config.soft_labels).distillation["temperature"])
    return config.distillation.temperature if config.distillation else 1.0


def training_set(config: TrainConfig, data: ImageData, preprocessing: Preprocessing, max_corrupt: int) -> TrainDataset:
    """The training images, with the labels of the data or with those of a teacher."""
    if config.soft_labels is not None:
        return ReplayDataset(config.soft_labels, data, preprocessing, max_corrupt)
    return TrainDataset(data.split("train"), preprocessing, config.augmentation, config.seed, max_corrupt)


def make_teacher(config: TrainConfig, data: ImageData, device: torch.device) -> Teacher | None:
    """The recipe's teacher for the images of the data, on a device; None if it has none."""
    if config.distillation is None:
        return None
    wanted = config.distillation
    model, own = load_teacher(wanted.teacher, wanted.teacher_weights, data.class_names)
    return Teacher(model, own, data.in_chans, wanted.temperature).to(device)
