"""Recipes: the hyper-parameters of a training run, their file format, and the recipes that ship.

The defaults are the paper's recipe on ImageNet where it states one (AdamW, learning rate 1e-3 for 1,024 images a step,
cosine decay, 300 epochs), and DeiT's for what it does not state (Touvron et al., arXiv:2012.12877, which the macro
designs that DMFormer follows are trained by): warm-up, weight decay, label smoothing, stochastic depth, RandAugment,
mixup, CutMix, random erasing, averaged weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

_SHIPPED = Path(__file__).parent / "recipes"

Share = Annotated[float, Meta(ge=0, le=1)]
Rate = Annotated[float, Meta(ge=0, lt=1)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]
Range = tuple[Positive, Positive]


class Recipe(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Hyper-parameters of one run.

    Attributes:
        arch: variant to train; ``None`` takes that of the weights to start from, or ``dmformer_s``.
        model: fields of the network's configuration, beside those that follow from the rest of the recipe.
        seed: seed of every random draw.
        preprocessing: how images become inputs at deployment; ``None`` takes that of the weights, or the task's usual.
        epochs: passes over the training images.
        steps: optimizer steps instead of epochs.
        interval: optimizer steps between validations and snapshots; ``None`` means an epoch.
        batch_size: images of one optimizer step, over all processes.
        accumulate: parts in which each process computes its share of a step, one after the other.
        learning_rate: the largest, for ``learning_rate_batch`` images a step; it is scaled linearly with them (Goyal
            et al., arXiv:1706.02677).
        learning_rate_batch: images of a step for which the learning rates are given.
        schedule: how the rate falls after the warm-up: half a cosine, or (1 - progress)^poly_power.
        poly_power: 0.9 is DeepLab's, 1 a straight line.
        min_learning_rate: what the rate does not fall below, for ``learning_rate_batch`` images.
        warmup_epochs: epochs in which the rate rises linearly.
        warmup_steps: the same in steps; replaces ``warmup_epochs``.
        weight_decay: weight decay of AdamW, on weights of two and more dimensions.
        clip_norm: gradients are scaled down to this L2 norm; ``None`` leaves them.
        precision: type of the forward and backward pass; weights stay in float32.
        ema_decay: decay of the moving average of the weights, which is validated and saved in their place; less in the
            first steps (``min(ema_decay, (1 + step) / (10 + step))``); 0 makes none. Choose it for the length of
            the run: it averages over about 1 / (1 - decay) steps.
        drop_path: largest rate of stochastic depth.
        label_smoothing: share of the target that is spread over all classes.
        sync_batch_norm: BatchNorm over the images of all processes (GPUs only).
        horizontal_flip: probability that an image is flipped.
        crop_scale: share of the image's area that a random crop covers (classification).
        crop_ratio: width of a random crop over its height (classification).
        randaugment_operations: operations for each image (Cubuk et al., arXiv:1909.13719); 0 is none.
        randaugment_magnitude: strength of the operations, of at most 30.
        rotation_degrees: largest random rotation.
        shift: largest random shift, as a share of the side.
        zoom: largest random change of size, as a share of it.
        erasing: probability that a rectangle is erased (Zhong et al., arXiv:1708.04896).
        mixup: parameter of mixup's Beta distribution (Zhang et al., arXiv:1710.09412); 0 is none.
        cutmix: parameter of CutMix's (Yun et al., arXiv:1905.04899). With both, each batch gets one of them by chance.
        resize_range: the image's shorter side over the input's before a random crop (segmentation).
        largest_class: a crop in which one class covers more than this share is drawn again (segmentation).
        color_jitter: largest random change of brightness, contrast and saturation, and a sixth of it in hue.
        workers: processes that decode images, for each training process.
    """

    arch: str | None = None
    model: dict[str, Any] = {}
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 0
    preprocessing: Preprocessing | None = None
    epochs: Count = 300
    steps: Count | None = None
    interval: Count | None = None
    batch_size: Count = 1024
    accumulate: Count = 1
    learning_rate: Positive = 1e-3
    learning_rate_batch: Count = 1024
    schedule: Literal["cosine", "poly"] = "cosine"
    poly_power: Positive = 0.9
    min_learning_rate: NotNegative = 1e-5
    warmup_epochs: NotNegative = 5.0
    warmup_steps: Annotated[int, Meta(ge=0)] | None = None
    weight_decay: NotNegative = 0.05
    clip_norm: Positive | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema_decay: Rate = 0.9999
    drop_path: Rate = 0.1
    label_smoothing: Rate = 0.1
    sync_batch_norm: bool = False
    horizontal_flip: Share = 0.5
    crop_scale: Range = (0.08, 1.0)
    crop_ratio: Range = (3 / 4, 4 / 3)
    randaugment_operations: Annotated[int, Meta(ge=0, le=15)] = 2
    randaugment_magnitude: Annotated[int, Meta(ge=1, le=29)] = 9
    rotation_degrees: Annotated[float, Meta(ge=0, le=180)] = 0.0
    shift: Share = 0.0
    zoom: Rate = 0.0
    erasing: Share = 0.25
    mixup: NotNegative = 0.8
    cutmix: NotNegative = 1.0
    resize_range: Range = (0.5, 2.0)
    largest_class: Share = 0.75
    color_jitter: Rate = 0.0
    workers: Annotated[int, Meta(ge=0, le=256)] = 4

    def __post_init__(self) -> None:
        for name in ("crop_scale", "crop_ratio", "resize_range"):
            low, high = getattr(self, name)
            if low > high:
                raise UsageError(f"recipe: {name} is {low} to {high}; expected the smaller one first")
        if self.crop_scale[1] > 1:
            raise UsageError(f"recipe: crop_scale goes up to {self.crop_scale[1]}; expected at most 1")

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary of JSON types; :func:`make_recipe` reads it back."""
        fields: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return fields


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.toml"))


def read_recipe(name: str) -> dict[str, Any]:
    """Read the fields that a recipe sets: a TOML file, or a shipped recipe by its name.

    Raises:
        UsageError: no such file or recipe, no TOML, or a key that is no field of a recipe.
    """
    path = _SHIPPED / f"{name}.toml" if name in shipped_recipes() else Path(name)
    try:
        values = msgspec.toml.decode(path.read_bytes())
    except OSError as error:
        known = ", ".join(shipped_recipes())
        raise UsageError(f"no recipe {name!r}; expected a TOML file or one of {known}") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # msgspec's errors are ValueErrors, and so is a number of 5,000 digits
        raise UsageError(f"recipe {name!r} is no TOML: {' '.join(str(error).split())}") from error
    _check_keys(values, f"recipe {name!r}")
    return dict(values)


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Make a recipe of a dictionary of JSON types; fields that it does not name keep their defaults.

    Raises:
        UsageError: an unknown key, all of which are named, or a value that is not of its type or range.
    """
    _check_keys(values, "recipe")
    try:
        return msgspec.convert(dict(values), Recipe)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, UsageError):  # from __post_init__, wrapped by msgspec
            raise error.__cause__ from None
        raise UsageError(f"recipe: {error}") from error


def _check_keys(values: Mapping[str, Any], what: str) -> None:
    if unknown := [str(key) for key in values if key not in Recipe.__struct_fields__]:
        raise UsageError(f"{what}: unknown key {', '.join(unknown)}; known: {', '.join(Recipe.__struct_fields__)}")
