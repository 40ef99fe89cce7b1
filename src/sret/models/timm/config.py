"""A model of timm, and how its blocks share weights: frozen dataclasses that check their values."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, cast

from sret.errors import InputError, did_you_mean
from sret.models.config import MAX_SIDE, known_fields
from sret.ranges import Channels, Classes, NonNegativeInt, PositiveInt, check_fields, check_number, fits

Share = Literal["sequence", "cycle", "middle", "similar"]
Init = Literal["first", "mean", "closest"]
Scale = Literal["none", "scalar", "vector"]
# Arguments of `timm.create_model` that read files or the network, or do not return a classifier.
REFUSED = (
    *("pretrained", "checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit"),
    *("features_only", "out_indices"),
    *("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict"),
)
OWN = ("img_size", "in_chans", "num_classes")  # arguments that are fields of `TimmConfig`
Value = None | bool | int | float | str
# Timm makes lists as long as some arguments, such as the depth: larger ones are typing errors, or take all memory.
MAX_ARGUMENT = 100_000
MAX_LENGTH = 100


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How a model is made recursive. The default changes nothing.

    Attributes:
        passes: how often the weights of a kept block are used: `passes` = 2 halves the weights of the blocks.
        extra_passes: so many more runs of every block, each with a gate that begins at 0, so that a trained model
            computes the same at the start.
        share: which blocks share weights. "sequence": neighbours (block 1, 1, 2, 2); "cycle": the sequence again
            (1, 2, 1, 2); "middle": neighbours, but the first and the last block keep their own; "similar": groups of
            neighbours of any size, as many as with "sequence", that compute the most similar functions on some images.
        init: the shared weights are those of the first of them, their mean, or the "closest": of these and the weights
            of the other blocks, those that change the outputs of the blocks least on some images.
        group_sizes: of share "similar", how many blocks (or pairs of Swin's) each group has, in all runs one after the
            other; found from images by default.
        rank: each pass corrects the shared matrices by one of this rank, and has biases, norms and other vectors of its
            own; 0 shares everything.
        slices: how many slices the patch tokens have in each pass, one number for each of the `passes`; 1 is attention
            between all tokens. The first pass slices neighbours, later ones take every G-th token. Class and register
            tokens belong to every slice. By default nothing is sliced.
        scale: each run of a block changes its input by a learned factor, which begins at 1: "scalar", or "vector" with
            one for each channel.
        projection: each run of a block is followed by a non-linear projection (NLL) of its own, at first the identity;
            for streams with channels last.
        damping: multiplies the gates of the extra passes by 1 / (extra_passes + 1).
        parts: names of the containers of blocks to change, such as "blocks"; by default all runs of equal blocks.
    """

    passes: PositiveInt = 1
    extra_passes: NonNegativeInt = 0
    share: Share = "sequence"
    init: Init = "first"
    group_sizes: tuple[int, ...] = ()
    rank: NonNegativeInt = 0
    slices: tuple[int, ...] = ()
    scale: Scale = "none"
    projection: bool = False
    damping: bool = False
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("parts", "slices", "group_sizes"):
            value = getattr(self, name)
            if isinstance(value, str | int):
                object.__setattr__(self, name, (value,))
            elif isinstance(value, Iterable) and not isinstance(value, Mapping):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.scale, bool):
            object.__setattr__(self, "scale", "scalar" if self.scale else "none")
        check_fields(self)
        self._check_effect()
        for size in self.group_sizes:
            check_number("group_sizes", size, PositiveInt)
        if self.group_sizes and self.share != "similar":
            raise InputError('group_sizes has no effect without share="similar"')
        if self.slices and self.share == "similar":
            raise InputError('slices need groups of `passes` blocks each; share="similar" makes groups of any size')
        for num_groups in self.slices:
            check_number("slices", num_groups, PositiveInt)
        if self.slices and len(self.slices) != self.passes:
            raise InputError(f"slices are {self.slices}; give one number for each pass, and passes is {self.passes}")

    @property
    def changed(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        return {name: value for name, value in vars(self).items() if value != getattr(Sharing, name)}

    @property
    def needs_images(self) -> str:
        """The option for which `recursify` needs images; empty if there is none."""
        if self.init == "closest":
            return 'init="closest"'
        return 'share="similar"' if self.share == "similar" and not self.group_sizes else ""

    def _check_effect(self) -> None:
        """Raises `InputError` for an option that would have no effect."""
        default = Sharing.__dataclass_fields__
        needs = {"share": "passes", "init": "passes", "rank": "passes", "damping": "extra_passes"}
        for name, other in needs.items():
            if getattr(self, name) != default[name].default and getattr(self, other) == default[other].default:
                raise InputError(f"{name} has no effect without {other}")


def sharing_of(options: Mapping[str, Any]) -> Sharing:
    """The options as `Sharing`. Raises `InputError` for unknown ones and for wrong values."""
    names = [field.name for field in fields(Sharing)]
    for name in options.keys() - names:
        raise InputError(f"recursify has no option {name!r}{did_you_mean(str(name), names)}")
    return Sharing(**options)


@dataclass(frozen=True, kw_only=True)
class TimmConfig:
    """A classifier of timm, whose blocks may share weights, be sliced, or run more than once.

    Attributes:
        timm: the name of the model for `timm.create_model`.
        args: other arguments of it, such as patch_size or depth: numbers, text, or lists of them.
        sharing: the options of `recursify`; the default changes nothing.
        img_size: pixels, one number or (height, width); by default those that the model was published for.
        in_chans: image channels.
        num_classes: number of logits.
    """

    timm: str
    args: dict[str, Any] = field(default_factory=dict)
    sharing: Sharing = field(default_factory=Sharing)
    img_size: int | tuple[int, int] | None = None
    in_chans: Channels = 3
    num_classes: Classes = 1000

    def __post_init__(self) -> None:
        if not isinstance(self.timm, str):
            raise InputError(f"timm is {self.timm!r}; give the name of a model of timm")
        published = published_size(self.timm)
        size = published if self.img_size is None else self.img_size
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        if len(sides) != 2 or not all(isinstance(pixels, int) and 1 <= pixels <= MAX_SIDE for pixels in sides):
            raise InputError(f"img_size {self.img_size!r} is not a number of pixels or (height, width)")
        object.__setattr__(self, "img_size", sides)
        check_fields(self)
        for key, value in self.args.items():
            if key in REFUSED:
                raise InputError(f"args: {key} is not an argument of the model; leave it out")
            if key in OWN:
                raise InputError(f"args: give {key} as a setting of the model, beside args")
            _check_argument(key, value)
        if self.sharing.needs_images:
            raise InputError(
                f"{self.sharing.needs_images} needs images; `sret recursify` finds groups and weights from them"
            )

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return cast(tuple[int, int], self.img_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and YAML; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TimmConfig":
        """The config that `to_dict` wrote. Raises `InputError` naming unknown or missing fields."""
        found = known_fields(cls, values)
        sharing = found.get("sharing", {})
        if not isinstance(sharing, Mapping | Sharing):
            raise InputError(f"sharing is {sharing!r}; give options of recursify, such as {{passes: 2}}")
        return cls(**{**found, "sharing": sharing if isinstance(sharing, Sharing) else sharing_of(sharing)})


def _check_argument(name: str, value: object) -> None:
    """Raises `InputError` unless an argument of timm is a number, text, or a list of them, none too large."""
    lists = [value, *value] if isinstance(value, list | tuple) else [value]
    flat = [one for part in lists for one in (part if isinstance(part, list | tuple) else [part])]
    if not all(fits(one, Value) or fits(one, list[Value]) for one in (lists[1:] or lists)):
        raise InputError(f"args: {name} is {value!r}; it must be a number, text, or a list of them")
    if any(isinstance(one, int) and abs(one) > MAX_ARGUMENT for one in flat):
        raise InputError(f"args: {name} is {value!r}; numbers are at most {MAX_ARGUMENT:,}")
    if any(isinstance(part, list | tuple) and len(part) > MAX_LENGTH for part in lists):
        raise InputError(f"args: {name} has more than {MAX_LENGTH} values")


def published_size(name: str) -> tuple[int, int]:
    """(height, width) in pixels of a timm model's images. Raises `InputError` for a name that timm does not know."""
    import timm

    known = timm.list_models()
    model, _, tag = name.partition(".")
    if model not in known:
        raise InputError(f"timm {timm.__version__} has no model {name!r}{did_you_mean(name, known)}")
    if timm.model_entrypoint(model).__module__.startswith("sret."):
        raise InputError(
            f"{name} is a model of sret, whose blocks share weights already; `sret train` takes its name without timm"
        )
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = ", ".join(timm.list_pretrained(f"{model}.*")) or "none"
        raise InputError(f"timm {timm.__version__} has no weights {tag!r} of {model}; it has {tags}") from None
    return (224, 224) if cfg is None else cast(tuple[int, int], tuple(cfg.input_size[1:]))
