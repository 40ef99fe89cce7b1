"""One optimizer step: images, targets, gradients, the update, and the advice if memory runs out."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sret.data.augment import mix
from sret.errors import InputError, is_out_of_memory
from sret.models.config import ModelConfig
from sret.models.sret import SReT
from sret.models.timm.config import TimmConfig
from sret.training import distributed
from sret.training.config import RuntimeConfig
from sret.training.distillation.teacher import soft_targets
from sret.training.setup import Setup
from sret.training.state import TrainingState

SHARE_OF_ALL_PASSES = 0.5  # of the targets of a step with fewer passes; the rest are the recipe's targets
PERMUTATIONS_PER_STEP = 1 << 20  # more than a step draws, so that steps do not share permutations


def train_step(setup: Setup, state: TrainingState, loaded: Iterator[Any]) -> tuple[Tensor, Tensor, Iterable[str]]:
    """One optimizer step.

    Returns the mean loss and the share of correct predictions of this process, as scalars on its device, and an error
    message for each image that could not be read.
    """
    setup.schedule.step_update(state.step)
    setup.set_passes(setup.passes_of(state.step))
    parts = setup.runtime.grad_accum_steps
    with out_of_memory_advice(setup.model_config, setup.runtime):
        computed = [forward_backward(setup, state.step, part, loaded) for part in range(parts)]
        losses, accuracies, errors = zip(*computed, strict=True)
        if setup.config.clip_grad is not None:
            setup.accelerator.clip_grad_norm_(setup.net.parameters(), setup.config.clip_grad)
        setup.optimizer.step()
        setup.optimizer.zero_grad()
    state.step += 1
    if setup.ema is not None:
        setup.ema.update(setup.model, state.step)
    return torch.stack(losses).mean(), torch.stack(accuracies).mean(), chain(*errors)


def forward_backward(setup: Setup, step: int, part: int, loaded: Iterator[Any]) -> tuple[Tensor, Tensor, Sequence[str]]:
    """Adds the gradient of one part of a step to the weights' gradients.

    Sets the RNG states of torch and of the model's permutations to functions of the seed, `step` and `part`.

    Returns the loss, the share of correct predictions, and an error message for each image, empty if it was read.
    """
    config, accelerator, parts = setup.config, setup.accelerator, setup.runtime.grad_accum_steps
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    images, labels, errors = next(loaded)
    images = images.to(accelerator.device, non_blocking=True)
    labels = labels.to(accelerator.device, non_blocking=True)
    targets = soft_targets(labels, len(setup.data.class_names), config.label_smoothing)
    if config.is_mixing:
        images, targets = mix(images, targets, config.mixup, config.cutmix, key=(config.seed, step))
    torch.manual_seed((config.seed << 32) + (step * parts + part) * num_ranks + rank)
    if isinstance(setup.model, SReT):
        setup.model.permuter.load_state_dict({"seed": config.seed, "count": step * PERMUTATIONS_PER_STEP})
    if setup.teacher is not None:
        with accelerator.autocast():
            targets = setup.teacher(images)
    images, compute = setup.preprocessing.normalize(images), partial(gradients, setup)
    if config.pass_weights and step >= setup.recursion_step and setup.passes_of(step) is not None:
        targets = torch.lerp(targets, setup.predictions_of_all_passes(images), SHARE_OF_ALL_PASSES)
    with distributed.reduce_gradients(setup.net, is_last=part == parts - 1):
        loss, accuracy = (compute if setup.graph is None else partial(setup.graph, compute))(images, targets)
    return loss, accuracy, errors


def gradients(setup: Setup, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the gradient of a part of a step to the weights' gradients; returns the loss and the share of correct ones.

    It only starts kernels, so that a CUDA graph can repeat it.
    """
    with setup.accelerator.autocast():
        logits = setup.net(images).float()
    loss = setup.criterion(logits / setup.temperature, targets)
    setup.accelerator.backward(loss / setup.runtime.grad_accum_steps)
    is_correct = logits.argmax(-1) == targets.argmax(-1)  # (B,), or (exits, B), the whole model last
    return loss.detach(), is_correct.view(-1, len(images))[-1].float().mean()


@contextmanager
def out_of_memory_advice(model: ModelConfig | TimmConfig, runtime: RuntimeConfig) -> Iterator[None]:
    """Within this context running out of memory raises `InputError` with the settings that need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        options = []
        if isinstance(model, ModelConfig) and model.exits != "passes" and not model.is_merging:
            policies = ("reversible",) if model.reversible else ("pass", "nested")
            less = policies[policies.index(model.memory) + 1 :] if model.memory in policies else policies
            options = [*(f"--model.memory {policy}" for policy in less)]
        options += [f"--grad_accum_steps {2 * runtime.grad_accum_steps}", "a smaller --batch_size"]
        raise InputError(
            f"a step ran out of memory; these need less, the first ones at the same batch size: {', '.join(options)}; "
            "--resume auto continues from the last saved state"
        ) from error
