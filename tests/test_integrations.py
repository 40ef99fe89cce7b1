"""Other libraries take the models as they are. Each is imported by its test, because some take seconds."""

import copy

import pytest
import timm
import torch
from conftest import small_config
from torch.nn.functional import cross_entropy

import sret
from sret import SReT

IMAGES, LABELS = torch.randn(4, 3, 64, 64), torch.arange(4)


def test_accelerate_saves_and_repeats_the_permutations_of_training(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(1)
    model = SReT(small_config(drop_path_rate=0.1))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))

    def step() -> torch.Tensor:
        loss = cross_entropy(model(IMAGES.to(accelerator.device)), LABELS.to(accelerator.device))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step()
    accelerator.save_state(str(tmp_path))
    first = [step() for _ in range(3)]
    accelerator.load_state(str(tmp_path))
    assert [step() for _ in range(3)] == first


@pytest.mark.slow
def test_peft_adds_and_merges_lora():
    import peft

    model, images = SReT(small_config()).eval().double(), IMAGES.double()  # steps of 1 make rounding large in float32
    with torch.no_grad():
        before = model(images)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["qkv", "fc1"], r=2))
    with torch.no_grad():
        torch.testing.assert_close(adapted(images), before)  # an adapter begins as nothing
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1.0)
    for _ in range(2):  # the first step changes only one of the two matrices
        cross_entropy(adapted(images), LABELS).backward()
        optimizer.step()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert all("lora" in name for name in trained)
    with torch.no_grad():
        after = adapted.eval()(images)
        assert not torch.allclose(after, before, atol=1e-4)
        torch.testing.assert_close(adapted.merge_and_unload()(images), after)


@pytest.mark.slow
def test_torchao_quantizes_the_weights():
    from torchao import quantization

    model = SReT(small_config()).eval()
    with torch.no_grad():
        before = model(IMAGES)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        after = model(IMAGES)
    assert type(model.stages[0].recursions[0].block.attn.branch.qkv.weight) is not torch.nn.Parameter
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, atol=0.1, rtol=0.1)


@pytest.mark.slow
def test_lightning_trains(tmp_path):
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = SReT(small_config())
            self.losses: list[float] = []

        def training_step(self, batch, _):
            loss = cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, LABELS), 4)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=8, default_root_dir=tmp_path, **options)
    module = Classifier()
    trainer.fit(module, loader)
    assert module.losses[-1] < module.losses[0]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Classifier()
    again.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"])


@pytest.mark.slow
def test_captum_attributes_a_prediction_to_pixels():
    from captum import attr

    model = SReT(small_config()).double().eval()
    x, target = IMAGES[:1].double(), 3
    method = attr.IntegratedGradients(model)
    # The sum over 64 steps misses the integral by up to 0.004 with some weights, over 256 by 0.001 (16 seeds).
    found, error = method.attribute(x, target=target, n_steps=256, return_convergence_delta=True)
    assert found.shape == x.shape
    change = (model(x) - model(torch.zeros_like(x)))[0, target]
    torch.testing.assert_close(found.sum(), change, atol=0.05 * change.abs().item() + 1e-3, rtol=0)
    assert error.abs() < 0.05 * change.abs() + 1e-3
    grad_cam = attr.LayerGradCam(model, model.stages[1]).attribute(x, target=target)
    assert grad_cam.shape == (1, 1, 4, 4)


@pytest.mark.slow
def test_a_unet_trains_on_the_maps_of_a_model():
    import segmentation_models_pytorch as smp

    sret.registry.register("sret_t_stem", "sret_t", stem_features=True)
    try:
        net = smp.Unet("tu-sret_t_stem", encoder_weights=None, classes=2)
    finally:
        timm.models._registry._model_entrypoints.pop("sret_t_stem")
        timm.models._registry._module_to_models["registry"].discard("sret_t_stem")
    optimizer, masks = torch.optim.SGD(net.parameters(), lr=0.1), (IMAGES[:, 0] > 0).long()
    losses = []
    for _ in range(3):
        loss = cross_entropy(net(IMAGES), masks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
