"""What is compared: from a name to a model, from a model to what runs, and whether all of it answers alike.

A contender is a model under an engine in a dtype. An engine whose answers are not those of the same model run eagerly
in float32 is an error. A model made by name has random weights, on which no time depends.
"""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from torch import Tensor, nn

from sret.bench.engines import DTYPES, ENGINES, Run, Subject, objection, own_engine
from sret.checkpoints.card import load_weights
from sret.errors import InputError, did_you_mean
from sret.export.runtime import ENGINES as EXPORTED
from sret.export.runtime import Exported, load_exported
from sret.models.sret import SReT

Source = str | nn.Module | Callable[[], nn.Module]
Key = tuple[str, str, str]  # model, engine, dtype

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.1}  # of the largest logit; of the loss in training


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How models are compared.

    Attributes:
        batch_size: images at a time.
        img_size: (height, width) in pixels; None is each model's own.
        dtypes, engines: every one with every other, and with every model, where that can be.
        is_training: time steps of training instead of answers.
        threads: of torch and of every engine; None is torch's choice.
        device: "cpu" or "cuda"; None takes a GPU if there is one.
        rounds: turns of each contender.
        memory: measure peak memory on a CPU too, each contender in a process of its own; on CUDA it always is.
    """

    batch_size: int = 8
    img_size: tuple[int, int] | None = None
    dtypes: tuple[str, ...] = ("float32",)
    engines: tuple[str, ...] = ("eager",)
    is_training: bool = False
    threads: int | None = None
    device: str | None = None
    rounds: int = 20
    memory: bool = False

    def __post_init__(self) -> None:
        for what, given, known in (("dtype", self.dtypes, DTYPES), ("engine", self.engines, ENGINES)):
            if not given:
                raise InputError(f"name a {what}: {', '.join(known)}")
            for name in given:
                if name not in known:
                    raise InputError(
                        f"unknown {what} {name!r}; there are {', '.join(known)}{did_you_mean(name, known)}"
                    )
        for name in ("batch_size", "rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")

    def torch_device(self) -> torch.device:
        """Raises `InputError` for a device that is not there."""
        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        kind, _, index = name.partition(":")
        if kind not in ("cpu", "cuda"):
            raise InputError(f"unknown device {name!r}; take cpu or cuda")
        if kind == "cuda" and not (index or "0").isdecimal():
            raise InputError(f"unknown device {name!r}; take cuda, or cuda:0 for the first of several")
        if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
            raise InputError(f"torch sees {torch.cuda.device_count()} CUDA devices here, so not {name}; take cpu")
        return torch.device(name)


# from a name to a model ----------------------------------------------------------------------------------------------


def named(names: Sequence[str]) -> dict[str, Source]:
    """A name given twice is compared with itself: the noise."""
    sources: dict[str, Source] = {}
    for name in names:
        label, count = Path(name).name if _is_file(name) else name, 1
        while label in sources:
            count += 1
            label = f"{name} ({count})"
        sources[label] = name
    return sources


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".safetensors", *EXPORTED) or Path(name).is_file()


def subject_of(name: str, source: Source, settings: Settings, device: torch.device) -> Subject:
    """A model and its batch of random images. Raises `InputError` if it cannot be made or cannot take them."""
    with torch.random.fork_rng(devices=[]), told(name, settings):
        torch.manual_seed(0)
        model: nn.Module
        own: tuple[int, ...] = ()
        if not isinstance(source, str):
            model = source if isinstance(source, nn.Module) else source()
        elif Path(source).suffix in EXPORTED:
            model = load_exported(source)[0]
        elif _is_file(source):
            model = load_weights(source)[0]
        else:
            model, own = _from_timm(source, settings.img_size)
            _stir(model)
        if settings.is_training and not any(p.requires_grad for p in model.parameters()):
            raise InputError(f"{name} is exported or fused, so it cannot be trained")
        channels, height, width = own or _input_size(model)
        size = settings.img_size or (height, width)
        subject = Subject(model.to(device), torch.randn(settings.batch_size, channels, *size).to(device))
        try:
            with torch.no_grad():
                answer = model(subject.images[:1])
        except Exception as error:  # a foreign model fails as it likes
            _refuse_memory(name, settings, error)
            at = f"{size[0]}x{size[1]} pixels, {channels} channels"
            raise InputError(f"{name} cannot take {at}: {_brief(error)}; try another --img-size") from error
    if not isinstance(answer, Tensor) or answer.ndim != 2:
        raise InputError(f"{name} does not give one row of logits per image, so it cannot be compared")
    return subject


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that a model is made for, as far as it says so."""
    if isinstance(model, SReT | Exported):
        return model.config.in_chans, *model.config.input_size
    cfg = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = cfg.get("input_size", (3, 224, 224))
    return channels, height, width


def _from_timm(name: str, size: tuple[int, int] | None) -> tuple[nn.Module, tuple[int, int, int]]:
    """A model without trained weights, and what it is made for; options stand after a colon."""
    variant, _, text = name.partition(":")
    known = timm.list_models()
    if variant.partition(".")[0] not in known:
        raise InputError(f"no model {variant!r}: give a model of timm or a weights file{did_you_mean(variant, known)}")
    options: dict[str, Any] = {}
    for option in filter(None, text.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            raise InputError(f"{name}: options are written {variant}:name=value,name=value")
        options[key.strip()] = yaml.safe_load(value)
    if "img_size" in options and size is not None:
        raise InputError(f"{name}: both img_size and --img-size are given; leave one out")
    model = _created(variant, options if size is None else {**options, "img_size": size}, name, size)
    channels, height, width = _input_size(model)
    if not isinstance(model, SReT):  # ours say it themselves
        channels, own = options.get("in_chans", channels), options.get("img_size", (height, width))
        height, width = (own, own) if isinstance(own, int) else own
    return model, (channels, height, width)


def _created(variant: str, options: dict[str, Any], name: str, size: tuple[int, int] | None) -> nn.Module:
    try:
        return timm.create_model(variant, **options)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except Exception as error:  # timm passes on whatever a constructor raises
        if size is not None and "img_size" in str(error) and isinstance(error, TypeError):
            return _created(variant, {k: v for k, v in options.items() if k != "img_size"}, name, None)
        at = "" if size is None else f" at {size[0]}x{size[1]} pixels"
        raise InputError(f"{name} cannot be made{at}: {_brief(error)}") from error


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    """Random numbers in place of constants: initial zeroes and tiny scales would hide what an engine gets wrong."""
    for parameter in model.parameters():
        if parameter.numel() and (parameter == parameter.flatten()[0]).all():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.ndim < 2 else 0.02)


# built and checked ---------------------------------------------------------------------------------------------------


def built_and_checked(
    subjects: Mapping[str, Subject],
    settings: Settings,
    device: torch.device,
    progress: Callable[[str], None],
    wanted: Callable[[Key], bool],
) -> tuple[dict[Key, Run], dict[Key, float], list[str]]:
    """What runs, how far its answers are from the reference, and what was left out and why."""
    runs: dict[Key, Run] = {}
    differences: dict[Key, float] = {}
    left_out: dict[str, None] = {}
    references: dict[str, Tensor] = {}
    asked = []
    for engine in settings.engines:
        for dtype in settings.dtypes:
            if reason := objection(engine, dtype, device, settings.is_training):
                left_out[f"{engine} {dtype}: {reason}"] = None
            else:
                asked.append((engine, dtype))
    for name, subject in subjects.items():
        if not isinstance(subject.model, Exported):
            if asked:
                with told(name, settings):
                    references[name] = _answer(ready(subject, "eager", "float32", settings), settings)
        elif device.type == "cuda":
            left_out[f"{name}: an exported model runs on the CPU; take --device cpu"] = None
        else:
            runs[(name, *own_engine(subject.model))] = subject.ready(*own_engine(subject.model))
    for engine, dtype in asked:
        for name, reference in references.items():
            subject, key = subjects[name], (name, engine, dtype)
            if not wanted(key):
                continue
            if engine == "fused" and not isinstance(subject.model, SReT):
                left_out[f"{name} fused: only models of sret can be fused"] = None
                continue
            progress(f"building {' '.join(key)}")
            try:
                with told(" ".join(key), settings):
                    run = ready(subject, engine, dtype, settings)
                    answer = _answer(run, settings)
            except (InputError, ModuleNotFoundError):
                raise
            except Exception as error:  # of a compiler or converter that does not know the model
                left_out[f"{' '.join(key)}: {_brief(error)}"] = None
                continue
            differences[key] = _difference(key, answer, reference, settings)
            runs[key] = run
    return _in_order(runs, list(subjects), settings), differences, list(left_out)


def _in_order(runs: Mapping[Key, Run], models: Sequence[str], settings: Settings) -> dict[Key, Run]:
    """By engine and dtype as they were asked for, then by model; the first model is the first row."""
    asked = [(engine, dtype) for engine in settings.engines for dtype in settings.dtypes]
    first = [(engine, dtype) for name, engine, dtype in runs if name == models[0] and (engine, dtype) not in asked]
    groups = dict.fromkeys([*first, *asked, *((engine, dtype) for _, engine, dtype in runs)])
    keys = [(name, engine, dtype) for engine, dtype in groups for name in models]
    return {key: runs[key] for key in keys if key in runs}


def ready(subject: Subject, engine: str, dtype: str, settings: Settings) -> Run:
    """What answers, or takes a step of training."""
    return subject.ready_to_train(engine, dtype) if settings.is_training else subject.ready(engine, dtype)


def _answer(run: Run, settings: Settings) -> Tensor:
    """Logits (B, K), or the losses of two steps, (2,): the second one shows the gradients of the first."""
    if settings.is_training:
        return torch.stack([run().cpu().double() for _ in range(2)])
    return run().cpu().double()


def _difference(key: Key, answer: Tensor, reference: Tensor, settings: Settings) -> float:
    difference = ((answer - reference).abs().max() / reference.abs().max()).item()
    allowed = TOLERANCE[key[2]]
    if not difference <= allowed:  # also if it is no number
        what = "loss" if settings.is_training else "answer"
        chance = "; without dropout and stochastic depth they should agree" if settings.is_training else ""
        raise InputError(
            f"{' '.join(key)}: its {what} differs from that of the same model run eagerly in float32 by "
            f"{difference:.1e} of it ({allowed:.0e} allowed); nothing was timed{chance}"
        )
    return difference


@contextmanager
def told(name: str, settings: Settings) -> Iterator[None]:
    """What a machine lacks, in words that say for what it was needed."""
    try:
        yield
    except Exception as error:
        _refuse_memory(name, settings, error)
        if "InvalidCxxCompiler" in f"{type(error)} {error}":
            raise InputError(f"{name}: torch.compile needs a C++ compiler, such as g++, and finds none") from error
        raise


def _refuse_memory(name: str, settings: Settings, error: Exception) -> None:
    text = str(error)
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in text for words in ("can't allocate memory", "not enough memory", "Failed to allocate", "bad_alloc")
    )
    if is_memory or "Storage size calculation overflowed" in text:
        raise InputError(
            f"{name}: a batch of {settings.batch_size} does not fit in memory; try a smaller --batch-size"
        ) from error


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(lines[0] if lines else type(error).__name__, 160)
