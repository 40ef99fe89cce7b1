"""Distillation: the authors' loss, a teacher with eyes of its own, and teachers that cannot be."""

from pathlib import Path

import pytest
import timm
import torch
from conftest import DATA, small_config
from safetensors.torch import load_file, save_file
from test_cli import make_checkpoint
from timm.loss import SoftTargetCrossEntropy
from torch import nn
from torch.nn.functional import cross_entropy

from sret import InputError
from sret.data.preprocess import Preprocessing
from sret.training.config import TrainConfig
from sret.training.distillation.config import Distillation
from sret.training.distillation.teacher import Teacher, load_teacher, soft_targets

GREY = Preprocessing(img_size=(16, 16), mean=(0.5,), std=(0.25,))
RGB = Preprocessing(img_size=(24, 24), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
TEN = [str(digit) for digit in range(10)]


@pytest.mark.parametrize("temperature", [1, 4])
def test_the_loss_is_the_authors(temperature):
    """Recorded from the authors' release."""
    golden = load_file(DATA / "soft_distillation.safetensors")
    teacher = Teacher(nn.Identity(), RGB, 3, temperature)
    teacher.preprocess = lambda x: x
    loss = SoftTargetCrossEntropy()(golden["student"] / temperature, teacher(golden["teacher"]))
    torch.testing.assert_close(loss, golden[f"loss_t{temperature}"].reshape(()))


def test_a_student_equal_to_its_teacher_has_no_gradient():
    logits = torch.randn(4, 7, dtype=torch.double, requires_grad=True)
    SoftTargetCrossEntropy()(logits / 3, (logits.detach() / 3).softmax(dim=1)).backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-15, rtol=0)


def test_targets_of_labels_are_those_of_label_smoothing():
    logits, labels = torch.randn(5, 7), torch.tensor([0, 6, 3, 3, 1])
    loss = SoftTargetCrossEntropy()(logits, soft_targets(labels, 7, 0.1))
    torch.testing.assert_close(loss, cross_entropy(logits, labels, label_smoothing=0.1))
    soft = torch.rand(5, 7)
    assert soft_targets(soft, 7, 0.1) is soft


def test_a_teacher_sees_with_its_own_size_channels_and_normalisation():
    """A grey image of one value, as the student has it, becomes that value for the teacher."""
    seen = []
    teacher = Teacher(nn.Identity(), RGB, 1, 1.0)
    teacher.model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]) or output.mean((2, 3)))
    teacher(torch.full((2, 1, 16, 16), 0.7))
    assert seen[0].shape == (2, 3, 24, 24)
    torch.testing.assert_close(seen[0], RGB.normalize(torch.full((2, 3, 24, 24), 0.7)))


def test_a_grey_teacher_of_colours_is_refused():
    with pytest.raises(InputError, match="the teacher takes grey images"):
        Teacher(nn.Identity(), GREY, 3, 1.0)


def test_a_teacher_is_frozen_and_stays_in_evaluation_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    teacher = Teacher(model, RGB, 3, 1.0).train()
    assert not any(module.training for module in teacher.modules())
    answers = teacher(torch.randn(3, 3, 24, 24, requires_grad=True))
    assert not answers.requires_grad
    torch.testing.assert_close(answers.sum(dim=1), torch.ones(3))


def test_a_weights_file_of_ours_teaches(tmp_path):
    path = make_checkpoint(tmp_path / "m.safetensors", small_config(), TEN)
    model, preprocessing = load_teacher(str(path), None, TEN)
    assert preprocessing.img_size == (64, 64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    with pytest.raises(InputError, match="has other classes than the data"):
        load_teacher(str(path), None, TEN[::-1])
    with pytest.raises(InputError, match="leave teacher_weights out"):
        load_teacher(str(path), path, TEN)
    nameless = make_checkpoint(tmp_path / "n.safetensors", small_config(num_classes=9))
    with pytest.raises(InputError, match="has 9 classes, the data has 10"):
        load_teacher(str(nameless), None, TEN)


def test_a_model_of_timm_teaches_from_a_file(tmp_path):
    model = timm.create_model("test_vit", num_classes=10)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    teacher, preprocessing = load_teacher("test_vit", tmp_path / "vit.safetensors", TEN)
    assert preprocessing.img_size == (160, 160)
    assert torch.equal(teacher.state_dict()["head.weight"], model.state_dict()["head.weight"])


def test_teachers_that_cannot_be_loaded_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"unknown teacher 'resnet19'.* did you mean 'resnet1"):
        load_teacher("resnet19", None, TEN)
    with pytest.raises(InputError, match=r"gone.pth: no such file.* resnet18"):
        load_teacher("resnet18", tmp_path / "gone.pth", TEN)
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"resnet18: .*should hold timm's weights for it, with 10"):
        load_teacher("resnet18", tmp_path / "bad.safetensors", TEN)


def test_settings_that_another_would_overrule_are_refused(tmp_path):
    teacher = Distillation(teacher="resnet18")
    with pytest.raises(InputError, match=r"label_smoothing is 0.1.* teacher"):
        TrainConfig(model="sret_t", distillation=teacher)
    with pytest.raises(InputError, match="both replace the labels"):
        TrainConfig(model="sret_t", distillation=teacher, soft_labels=tmp_path, label_smoothing=0.0)
    with pytest.raises(InputError, match="have their own crops"):
        TrainConfig(model="sret_t", soft_labels=Path("labels"), label_smoothing=0.0)
    with pytest.raises(InputError, match=r"temperature is 0\.0; it must be a number > 0"):
        Distillation(teacher="resnet18", temperature=0.0)
    with pytest.raises(InputError, match="it must be even"):
        TrainConfig(model="sret_t", mixup=0.8, batch_size=9)
    with pytest.raises(InputError, match=r"optimizer is 'madgrad'; it must be one of adamw, sgd"):
        TrainConfig(model="sret_t", optimizer="madgrad")
