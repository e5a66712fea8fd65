"""Every option of an export and of compiling an engine: its name, its default and a sentence about it, once.

Python's :func:`dmformer.export` and the command line both read them here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from dmformer.bundle.manifest import DEFAULT_BUNDLE, SAFE_WEIGHT_BITS, WEIGHT_BITS
from dmformer.data.preprocessing import Interpolation
from dmformer.errors import UsageError
from dmformer.progress import Progress, silent
from dmformer.runtimes.target import AUTO, compute_capability
from dmformer.task import TASKS, Task

P = ParamSpec("P")
Options = TypeVar("Options")
Result = TypeVar("Result")

ChannelOrder = Literal["rgb", "bgr"]

_MOST_BATCH = 4096
_MOST_WORKSPACE_MB = 1 << 20
_LARGEST_SHIFT = 2.0  # of means and deviations on the scale 0..1; larger ones are meant for pixels of 0..255


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is compiled, for formats that are.

    Raises:
        UsageError: a target is none, or a bound is out of range or out of order.
    """

    flavour: Annotated[str, "Of TensorRT: tensorrt (10 or 11), rtx (TensorRT-RTX), or auto."] = AUTO
    targets: Annotated[
        Sequence[str], "GPU to build TensorRT engines for ahead of time, like sm89; otherwise this machine's."
    ] = ()
    min_batch: Annotated[int, "Smallest batch of a TensorRT engine."] = 1
    opt_batch: Annotated[int, "Batch that a TensorRT engine is tuned for."] = 1
    max_batch: Annotated[int, "Largest batch of a TensorRT engine."] = 8
    workspace_mb: Annotated[int | None, "Most GPU memory for one layer's work, in MiB."] = None

    def __post_init__(self) -> None:
        """Check the bounds, and write every target as ``8.9``, however it was given."""
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch <= _MOST_BATCH:
            raise UsageError(
                f"batches {self.min_batch}, {self.opt_batch}, {self.max_batch} (least, tuned for, most); expected them "
                f"in order, 1 to {_MOST_BATCH}"
            )
        if self.workspace_mb is not None and not 1 <= self.workspace_mb <= _MOST_WORKSPACE_MB:
            raise UsageError(f"workspace {self.workspace_mb} MiB; expected 1 to {_MOST_WORKSPACE_MB}")
        object.__setattr__(self, "flavour", self.flavour.lower())
        object.__setattr__(self, "targets", tuple(dict.fromkeys(map(compute_capability, self.targets))))


@dataclass(frozen=True)
class ExportOptions:
    """What an export is asked for.

    Raises:
        UsageError: a number is out of range.
    """

    weights: Annotated[
        str | Path | None,
        "Checkpoint (safetensors, or what torch.save wrote); otherwise the demonstration's or, with an architecture "
        "alone, random weights. In Python an nn.Module may stand here, as at module.",
    ] = None
    _: KW_ONLY
    arch: Annotated[str | None, "dmformer_nano, _t, _s or _l; with _fpn or _upernet after nano or s too."] = None
    module: Annotated[
        Any,
        "Network of one's own, FILE.py:NAME or package.module:NAME: a function or class that makes it, or the network "
        "itself. This runs the file's code. In Python an nn.Module as well.",
    ] = None
    module_options: Annotated[
        Mapping[str, Any] | None, "Arguments of the function or class that makes a network of one's own."
    ] = None
    task: Annotated[Task | None, "features: the four stage maps, without a head. Otherwise the network's own."] = None
    formats: Annotated[
        Sequence[str], "onnx, openvino (ov), tensorrt (trt), ncnn, litert, torch or all that can be made here."
    ] = ("onnx",)
    precisions: Annotated[
        Sequence[str], "fp32, fp16 or int8. auto: for each format the fastest here within the accuracy budget."
    ] = ("fp32",)
    output: Annotated[str | Path, "Folder of the bundle; a bundle that is there is replaced."] = DEFAULT_BUNDLE
    image_size: Annotated[int | None, "Side of the input in pixels; otherwise the checkpoint's."] = None
    preprocessing: Annotated[
        str | Path | None,
        "File that says how images are prepared: timm's config.json, Hugging Face's preprocessor_config.json, or "
        "OpenMMLab's configuration; otherwise the checkpoint's metadata, or such a file beside it.",
    ] = None
    mean: Annotated[
        Sequence[float] | None,
        "Subtracted from each channel, on the scale 0..1, in the order in which the network sees them; one number "
        "stands for all.",
    ] = None
    std: Annotated[Sequence[float] | None, "Then divides each channel, as the mean is given."] = None
    interpolation: Annotated[Interpolation | None, "How images are resized: bicubic or bilinear."] = None
    crop_fraction: Annotated[
        float | None, "Part of the resized image's shorter side that the centre crop keeps, up to 1."
    ] = None
    channel_order: Annotated[
        ChannelOrder | None, "Order in which the network sees the channels: rgb, or bgr as OpenCV reads images."
    ] = None
    classes: Annotated[
        str | Path | None,
        "File of the classes' names in the order of the outputs: one a line, or a JSON list or dictionary by index.",
    ] = None
    open_size: Annotated[bool, "Leave height and width open (segmentation: multiples of 32)."] = False
    images: Annotated[str | Path | None, "Folder of real images to compare on; noise fills up."] = None
    calibration: Annotated[
        str | Path | None,
        "Folder of images like those the device will see, for int8, 512 of them at most; in folders named after their "
        "classes (segmentation: in ADE20K's folders, the training part), or not.",
    ] = None
    max_accuracy_drop: Annotated[
        float,
        "Percentage points of accuracy that fp16 and int8 may lose against PyTorch on the calibration images: of top-1 "
        "or mean intersection over union with labels, of agreement without.",
    ] = 0.5
    weight_bits: Annotated[
        int,
        "Bits of int8 weights: 7 is right on every processor; 8 for fleets known to have VNNI (x86) or the dot product "
        "(Arm), and for TensorRT.",
    ] = SAFE_WEIGHT_BITS
    deploy_form: Annotated[bool, "Fold everything linear before tracing: the same function, faster."] = True
    options: Annotated[
        Mapping[str, Any] | None,
        "Fields of the network's configuration that override the checkpoint's, like gate_input=x_prime or "
        "dilations=[1,1,1].",
    ] = None
    weights_key: Annotated[
        str | None, "Where the checkpoint holds several sets of weights, the key of one, like ema; . for the top level."
    ] = None
    key_map: Annotated[
        str | Path | None,
        "File that leads from the checkpoint's names to ours, and has the configuration: it takes the place of the "
        "network's code.",
    ] = None
    save_key_map: Annotated[
        str | Path | None, "File to write that map to, where a network of one's own was recognised as a DMFormer."
    ] = None
    seed: Annotated[int, "Of the random weights that an architecture alone gets."] = 0
    engine: Annotated[EngineOptions, "How formats that are compiled are compiled."] = EngineOptions()
    force: Annotated[bool, "Write the bundle although a parity check failed."] = False
    use_cache: Annotated[
        bool,
        "Take what was made and measured before with the same inputs (dmformer cache), and keep new results.",
    ] = True
    stage: Annotated[Progress, "Told about each step."] = silent

    def __post_init__(self) -> None:
        """Refuse values that are out of range, and give one form to those that mean the same."""
        for name in ("formats", "precisions"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
            if not getattr(self, name):
                raise UsageError(f"no `{name}`; expected at least one, for instance {getattr(type(self), name)[0]}")
        object.__setattr__(self, "options", dict(self.options or {}))
        object.__setattr__(self, "engine", self.engine or EngineOptions())
        if self.task not in (None, *TASKS):
            raise UsageError(f"`task` is {self.task!r}; expected one of {', '.join(TASKS)}")
        if self.module is None and self.weights is not None and not isinstance(self.weights, (str, Path)):
            object.__setattr__(self, "module", self.weights)
            object.__setattr__(self, "weights", None)
        if self.module is None and self.module_options:
            raise UsageError("`module_options` without `module`; expected the network that they are for as well")
        if self.module is not None and (self.arch is not None or self.options):
            raise UsageError("`module` with `arch` or `options`, which are of a DMFormer; expected `module_options`")
        self._check_key_map()
        if not 0 <= self.max_accuracy_drop <= 100:
            raise UsageError(f"`max_accuracy_drop` is {self.max_accuracy_drop:g}; expected percentage points, 0 to 100")
        if type(self.weight_bits) is not int or self.weight_bits not in WEIGHT_BITS:
            raise UsageError(f"`weight_bits` is {self.weight_bits!r}; expected 7, right on every processor, or 8")
        self._check_preprocessing()

    def _check_key_map(self) -> None:
        if self.key_map is not None and (self.module is not None or self.arch is not None):
            other = "module" if self.module is not None else "arch"
            raise UsageError(f"`key_map` with `{other}`; expected one of them, for each says which network it is")
        if self.key_map is not None and self.weights is None:
            raise UsageError("`key_map` without `weights`; expected the checkpoint whose names are in it as well")
        if self.save_key_map is not None and self.module is None:
            raise UsageError("`save_key_map` without `module`; expected the network whose names it leads from as well")

    def _check_preprocessing(self) -> None:
        for name, least in (("mean", -_LARGEST_SHIFT), ("std", 1e-6)):
            values = getattr(self, name)
            if values is not None and not (len(values) in (1, 3) and all(least <= v <= _LARGEST_SHIFT for v in values)):
                shown = ",".join(f"{value:g}" for value in values)
                above = " above 0" if name == "std" else ""
                raise UsageError(
                    f"`{name}` {shown}; expected one number or one for each channel{above}, on the scale 0..1: "
                    "divide by 255 what is meant for 0..255"
                )
        if self.crop_fraction is not None and not 1 / 64 <= self.crop_fraction <= 1:
            raise UsageError(f"`crop_fraction` {self.crop_fraction:g}; expected 1/64 to 1")
        for name, kind in (("interpolation", Interpolation), ("channel_order", ChannelOrder)):
            if getattr(self, name) not in (None, *get_args(kind)):
                raise UsageError(f"`{name}` {getattr(self, name)!r}; expected {' or '.join(get_args(kind))}")


@functools.cache
def sentences(options: type) -> dict[str, str]:
    """The sentence about each field of a class of options."""
    hints = get_type_hints(options, include_extras=True)
    return {name: get_args(hint)[1] for name, hint in hints.items() if get_origin(hint) is Annotated}


def keywords_of(options: Callable[P, Options]) -> Callable[[Callable[[Options], Result]], Callable[P, Result]]:
    """Let a function of a class of options be called with its fields, which its signature and its docstring show."""

    def decorate(function: Callable[[Options], Result]) -> Callable[P, Result]:
        @functools.wraps(function)
        def call(*arguments: P.args, **keywords: P.kwargs) -> Result:
            return function(options(*arguments, **keywords))

        assert isinstance(options, type)
        hints, taken = get_type_hints(options), inspect.signature(options).parameters.values()
        call.__signature__ = inspect.signature(function).replace(  # type: ignore[attr-defined]
            parameters=[parameter.replace(annotation=hints[parameter.name]) for parameter in taken]
        )
        said = sentences(options)
        arguments = "\n".join(f"    {field.name}: {said[field.name]}" for field in fields(options))
        before, raises, after = inspect.cleandoc(function.__doc__ or "").partition("Raises:")
        call.__doc__ = f"{before}Args:\n{arguments}\n\n{raises}{after}"
        return call

    return decorate
