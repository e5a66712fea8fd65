"""The reference: golden images, and PyTorch's answers to them in float32 and float64."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from dmformer._optional import require
from dmformer.bundle.golden import Golden, thinned
from dmformer.data.images import load_pixels, spread, synthetic_pixels
from dmformer.errors import CheckFailed, UsageError
from dmformer.task import STRIDES
from dmformer.verify.answers import batch_sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from dmformer.bundle.reader import Bundle
    from dmformer.data.images import ImageSet
    from dmformer.data.preprocessing import Preprocessing
    from dmformer.models.checkpoint import Checkpoint
    from dmformer.verify.tasks import Measure


GOLDEN_IMAGES = 5
_MOST_REAL = 3  # of the golden images; the others are noise, which reaches what few images may not
_OTHER_SIZE_IMAGES = 2  # of another size, where height and width are open
_SEED = 20230604
_MOST_KEPT = 1 << 18  # values of one output for one image; 21 MB for all golden images in float32 and float64


class OwnModule(NamedTuple):
    """A network of one's own, as :func:`dmformer.models.own.load_own` takes it; importing it runs its code.

    Attributes:
        module: ``FILE.py:NAME``, ``package.module:NAME``, an ``nn.Module`` or a ``torch.export`` program's path.
        options: arguments that it is made with; otherwise those in the manifest.
    """

    module: Any
    options: Mapping[str, Any] | None

    @classmethod
    def of(cls, module: Any, options: Mapping[str, Any] | None) -> OwnModule | None:
        """What two arguments of a function ask for; ``None`` where neither is given.

        Raises:
            UsageError: there are options, and no network that they are for.
        """
        if module is None and options:
            raise UsageError("`module_options` without `module`; expected the network that they are for as well")
        return None if module is None else cls(module, options)


class ReferenceSource(NamedTuple):
    """What a bundle is compared with, beside what is in it; the arguments of :func:`reference_checkpoint`.

    Attributes:
        weights: a checkpoint file.
        module: a network of one's own.
        weights_key: which of several sets of weights in the file.
    """

    weights: Path | None = None
    module: OwnModule | None = None
    weights_key: str | None = None

    @classmethod
    def of(cls, weights: str | Path | None, module: OwnModule | None, weights_key: str | None) -> ReferenceSource:
        """Return what three arguments of a function ask for.

        Raises:
            UsageError: there is a key, and no file that it is for.
        """
        if weights_key is not None and weights is None:
            raise UsageError("`weights_key` without `weights`; expected the file that it is for as well")
        return cls(None if weights is None else Path(weights), module, weights_key)

    @property
    def is_given(self) -> bool:
        """Whether there is anything to compare with."""
        return self.weights is not None or self.module is not None


def reference_checkpoint(
    bundle: Bundle, weights: Path | None, module: OwnModule | None = None, weights_key: str | None = None
) -> Checkpoint:
    """Load a checkpoint file, a network of one's own, or the checkpoint in the bundle's ``torch`` format.

    Raises:
        CheckFailed: the bundle's file is not what its manifest says.
        UnavailableError: PyTorch is not installed.
        UsageError: the file cannot be used, or there is neither.
    """
    require("torch", extra="export", purpose="comparing with a checkpoint")
    from dmformer.models.checkpoint import load_checkpoint
    from dmformer.models.dmformer import FEATURES_ONLY
    from dmformer.models.infer import HIDDEN_FIELDS
    from dmformer.models.program import is_program

    if module is None and weights is not None and is_program(weights):
        module, weights = OwnModule(weights, None), None
    origin = bundle.manifest.model.module
    if module is not None:
        return _own_checkpoint(bundle, weights, module, weights_key)
    if origin is not None:
        raise UsageError(
            f"the bundle's network is {origin.reference}, and its code is not in the bundle; expected `module` as "
            "well, and the `weights` that it was made with"
        )
    config = bundle.manifest.model.config
    options = FEATURES_ONLY if bundle.manifest.model.task == "features" else {}
    if weights is not None:
        # What neither names nor shapes nor the file's metadata tell is taken from the bundle: a plain .pth could not
        # be compared otherwise.
        fallback = {name: config[name] for name in HIDDEN_FIELDS if name in config}
        key_map = bundle.manifest.model.key_map
        checkpoint = load_checkpoint(
            weights, options=options, fallback=fallback, weights_key=weights_key, key_map=key_map
        )
        ours = checkpoint.config.to_dict()
        for field in ("task", "in_channels", "num_classes"):
            if ours[field] != config.get(field):
                raise UsageError(
                    f"{weights}: {field} is {ours[field]}, in the bundle it is {config.get(field)}; expected the "
                    "checkpoint that the bundle was made from"
                )
        return checkpoint
    for artifact in bundle.artifacts("torch"):
        checkpoint = load_checkpoint(bundle.load_path(artifact))
        if checkpoint.sha256 != artifact.files[0].sha256:
            raise CheckFailed(f"{bundle.root / artifact.files[0].path} changed while it was loaded; run it again")
        return checkpoint
    raise UsageError(
        "images have no stored answers; give the checkpoint as `weights`, or export the format torch as well"
    )


def _own_checkpoint(bundle: Bundle, weights: Path | None, own: OwnModule, weights_key: str | None) -> Checkpoint:
    from dmformer.models.own import load_own
    from dmformer.models.recognise import recognise

    manifest = bundle.manifest
    origin = manifest.model.module
    options = own.options if own.options or origin is None else origin.options
    if not isinstance(own.module, str):
        options = None  # it is made already
    size, seed = manifest.preprocessing.image_size, manifest.model.seed or 0
    checkpoint = load_own(own.module, options, weights, size, seed, weights_key).checkpoint
    return recognise(checkpoint) if origin is None else checkpoint


def form_in(bundle: Bundle, model: nn.Module) -> nn.Module:
    """The form of a network that a bundle's artifacts compute."""
    from dmformer.models.deploy import deploy

    manifest = bundle.manifest
    if not manifest.model.deploy_form:
        return model
    return deploy(model, None if manifest.open_size else manifest.preprocessing.image_size)


def golden_pixels(preprocessing: Preprocessing, images: Sequence[Path]) -> NDArray[np.uint8]:
    """Real images where there are some, and noise: uint8 (GOLDEN_IMAGES, H, W, C).

    Raises:
        UsageError: an image cannot be read.
    """
    chosen = spread(images, _MOST_REAL)
    noise = synthetic_pixels(
        GOLDEN_IMAGES - len(chosen), preprocessing.image_size, len(preprocessing.channels), seed=_SEED
    )
    if not chosen:
        return noise
    return np.concatenate([load_pixels(chosen, preprocessing), noise])


def source_images(preprocessing: Preprocessing) -> tuple[NDArray[np.uint8], ...]:
    """Noise before resizing and cropping, uint8 (H, W, 3): a wide image to be made smaller, a tall one larger."""
    side = preprocessing.image_size
    wide = synthetic_pixels(1, round(1.5 * side), 3, seed=_SEED)[0]
    tall = synthetic_pixels(1, round(0.75 * side), 3, seed=_SEED + 1)[0]
    return wide[:side], tall[:, : side // 2]


def make_golden(model: nn.Module, preprocessing: Preprocessing, pixels: NDArray[np.uint8]) -> Golden:
    """Run the network on preprocessed images, in float32 in the largest batches and in float64 image by image."""
    sources = source_images(preprocessing)
    return replace(
        _answered(model, preprocessing, pixels),
        sources=sources,
        source_pixels=np.stack([preprocessing.pixels(Image.fromarray(source)) for source in sources]),
    )


def golden_at_other_size(model: nn.Module, preprocessing: Preprocessing) -> Golden:
    """Noise images of another height and width, wider than high, and what PyTorch answers: for inputs of open size."""
    side = preprocessing.image_size + STRIDES[-1] * 2
    noise = synthetic_pixels(_OTHER_SIZE_IMAGES, side, len(preprocessing.channels), seed=_SEED + 2)
    return _answered(model, preprocessing, np.ascontiguousarray(noise[:, : side - STRIDES[-1]]))


def _answered(model: nn.Module, preprocessing: Preprocessing, pixels: NDArray[np.uint8]) -> Golden:
    inputs = preprocessing.normalize(pixels)
    size = batch_sizes(inputs)[-1]
    first = torch_outputs(model, inputs[:size])
    strides = {name: _stride(array.shape[1:]) for name, array in first.items()}

    def run(network: nn.Module, rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return thinned(torch_outputs(network, rows), strides)

    parts = [thinned(first, strides)]
    del first  # maps of a large image are large
    parts += [run(model, inputs[start : start + size]) for start in range(size, len(inputs), size)]
    double = in_double(model)
    return Golden(
        images=pixels,
        inputs=inputs,
        outputs=_joined(parts),
        outputs_float64=_joined([run(double, row[None].astype(np.float64)) for row in inputs]),
        strides=strides,
    )


def _stride(shape: tuple[int, ...]) -> int:
    """How many rows and columns of an output go by for one that is kept, so that no image has too many values."""
    channels, *sides = shape
    stride = 1
    while sides and stride < min(sides) and channels * math.prod(-(-side // stride) for side in sides) > _MOST_KEPT:
        stride += 2
    return stride


def _joined(parts: Sequence[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def torch_outputs(model: nn.Module, inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """What a network of any task and form gives for (N, C, H, W), by name."""
    import torch

    from dmformer.models.dmformer import outputs_by_name

    with torch.inference_mode():  # holds for one thread
        return {name: output.numpy() for name, output in outputs_by_name(model(torch.from_numpy(inputs))).items()}


def torch_answers(model: nn.Module, images: ImageSet, measure: Measure, advance: Callable[[], object]) -> NDArray[Any]:
    """What a measure keeps of the network's float32 outputs for each image.

    Raises:
        StageFailed: an answer is NaN or infinite.
        UsageError: an image cannot be read.
    """
    return measure.collect(images, functools.partial(torch_outputs, model), advance, "PyTorch itself")


def in_double(model: nn.Module) -> nn.Module:
    """A copy of a network in float64, with depth-wise convolutions by :func:`depthwise`."""
    import torch

    double = copy.deepcopy(model).double()
    for module in double.modules():
        if type(module) is torch.nn.Conv2d and _keeps_size_by_channel(module):
            module.forward = functools.partial(_depthwise, module)  # type: ignore[method-assign]
    return double


def _keeps_size_by_channel(conv: nn.Conv2d) -> bool:
    """Whether it is what :func:`depthwise` computes: one square kernel a channel, stride 1, zeros around."""
    (height, width), (dilation, other) = conv.kernel_size, conv.dilation
    padding = dilation * (height // 2)
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and height == width
        and height % 2 == 1
        and dilation == other
        and (*conv.stride,) == (1, 1)
        and conv.padding == (padding, padding)
        and conv.padding_mode == "zeros"
    )


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, dilation: int) -> Tensor:
    """A depth-wise convolution of stride 1 as shifted products added up: (N, C, H, W) -> (N, C, H, W).

    PyTorch has no kernel of its own for it in float64, and takes two to three times as long.
    """
    from torch.nn import functional as F

    height, width = x.shape[2:]
    padded = F.pad(x, (padding,) * 4)
    taps = weight[:, 0].permute(1, 2, 0)  # (C, k, k) -> (k, k, C)
    total = x.new_zeros(x.shape)
    for top, row in enumerate(taps):
        for left, tap in enumerate(row):
            window = padded[:, :, top * dilation :, left * dilation :][:, :, :height, :width]
            total.addcmul_(window, tap[:, None, None])
    return total if bias is None else total + bias[:, None, None]


def _depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return depthwise(x, conv.weight, conv.bias, int(conv.padding[0]), conv.dilation[0])
