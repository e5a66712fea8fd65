"""What an export starts from: a checkpoint, a network of one's own, the demonstration, or seeded random weights.

The random weights hide nothing. A freshly initialised network mutes its blocks (layer scale starts at 0.01, BatchNorm
is the identity, gates sit at one half), so a comparison of outputs would pass with whole branches broken. These weights
keep every part loud enough for an error in it to reach the output, and no part so loud that rounding errors grow from
block to block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dmformer.assets import DEMONSTRATIONS
from dmformer.data.description import read_class_names, read_description
from dmformer.data.images import ImageSet, list_images
from dmformer.errors import UsageError
from dmformer.models.checkpoint import Checkpoint, checked_classes, default_preprocessing, load_checkpoint
from dmformer.models.dmformer import FEATURES_ONLY, DMFormerBackbone, Gate, LayerScale, create_model
from dmformer.models.key_map import read_key_map
from dmformer.models.own import load_own
from dmformer.models.program import is_program
from dmformer.models.recognise import recognise
from dmformer.verify.tasks import measure_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dmformer.data.description import InputDescription
    from dmformer.export.options import ExportOptions


def lively_(model: DMFormerBackbone, seed: int = 0) -> DMFormerBackbone:
    """Overwrite all weights and statistics in place; returns the model in evaluation mode.

    BatchNorm statistics are measured on seeded noise, then moved away from it. They are kept to the precision of
    float16 (values, not type), so that the order in which a machine adds does not show in them.
    """
    draw = _Draw(seed)
    with torch.no_grad():
        for module in model.modules():
            _overwrite(module, draw)
        for gate in (module for module in model.modules() if isinstance(module, Gate)):
            assert gate.fc1.bias is not None
            gate.fc1.bias.abs_().add_(0.3)  # no gate of dead ReLUs: a narrow one has few
        model.train()(draw.normal(torch.Size((8, model.config.in_channels, 64, 64)), 1.0))
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            _unsettle(norm, draw)
    return model.eval()


class _Draw:
    """Seeded random tensors."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, shape: torch.Size, low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=self.generator) * (high - low) + low

    def normal(self, shape: torch.Size, std: float) -> Tensor:
        return torch.randn(shape, generator=self.generator) * std


def _overwrite(module: nn.Module, draw: _Draw) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        # Variance is kept through a layer that follows a ReLU (He et al., arXiv:1502.01852).
        module.weight.copy_(draw.normal(module.weight.shape, (2.0 / module.weight[0].numel()) ** 0.5))
        if module.bias is not None:
            module.bias.copy_(draw.normal(module.bias.shape, 0.3))
    elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
        module.weight.copy_(draw.uniform(module.weight.shape, 0.6, 1.4))
        module.bias.copy_(draw.normal(module.bias.shape, 0.3))
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # plain averages, not exponential ones
    elif isinstance(module, LayerScale):
        module.gamma.copy_(draw.uniform(module.gamma.shape, 0.2, 0.6))


def _unsettle(norm: nn.BatchNorm2d, draw: _Draw) -> None:
    """Move measured statistics away from what was measured, as training leaves them."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    deviation = norm.running_var.sqrt()
    norm.running_mean += deviation * draw.normal(deviation.shape, 0.2)
    norm.running_var *= draw.uniform(deviation.shape, 0.7, 1.4)
    for statistic in (norm.running_mean, norm.running_var):
        statistic.copy_(_keep_bits(statistic, 11))
    norm.momentum = 0.1


def _keep_bits(values: Tensor, bits: int) -> Tensor:
    """The values rounded to so many significant bits."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**bits).round(), exponent - bits)


@dataclass(frozen=True)
class Network:
    """The network of an export.

    Attributes:
        checkpoint: weights, configuration and preprocessing.
        weights: where they came from; ``random`` is marked in the manifest, and ``module`` came with a network of
            one's own.
        seed: of random weights.
        images: real images for the golden set; noise fills it up.
        calibration: images that stand for what the device will see.
    """

    checkpoint: Checkpoint
    weights: Literal["checkpoint", "demonstration", "random", "module"]
    seed: int | None
    images: tuple[Path, ...]
    calibration: ImageSet | None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what was assumed of the checkpoint, and about files that were passed over."""
        return (*self.checkpoint.notes, *(self.calibration.notes if self.calibration else ()))


def find_network(options: ExportOptions) -> Network:
    """Find what is named: a network of one's own, a file, or an architecture with random weights.

    Where nothing is named, it is the demonstration of the task.

    Task ``features`` takes any network's stages; the others have to be the network's own.

    Raises:
        UsageError: the checkpoint, the architecture, an option or a folder of images cannot be used, or the task is
            another than the network's.
    """
    seed, folder = None, options.calibration
    given = _given_preprocessing(options)
    images = tuple(list_images(Path(options.images))) if options.images is not None else ()
    config = {**(options.options or {}), **(FEATURES_ONLY if options.task == "features" else {})}
    weights: Literal["checkpoint", "demonstration", "random", "module"]
    tasks = ["features"]
    path = Path(options.weights) if options.weights is not None else None
    module = options.module
    if module is None and options.arch is None and path is not None and is_program(path):
        module, path = path, None
    if module is not None:
        key = options.weights_key
        own_network = load_own(module, options.module_options, path, seed=options.seed, weights_key=key, **given)
        checkpoint, tasks = recognise(own_network.checkpoint), []
        if options.save_key_map is not None and checkpoint.key_map is None:
            raise UsageError(f"`save_key_map`: the network was {checkpoint.notes[-1]}; expected a DMFormer")
        weights = "random" if own_network.random else "checkpoint" if options.weights is not None else "module"
        seed = options.seed if own_network.random else None
    elif options.weights is not None:
        weights = "checkpoint"
        given["key_map"] = None if options.key_map is None else read_key_map(Path(options.key_map))
        checkpoint = load_checkpoint(options.weights, options.arch, config, weights_key=options.weights_key, **given)
        if options.key_map is not None and checkpoint.described:
            raise UsageError("`key_map` for a checkpoint of this program, which has our names; expected it alone")
    elif options.arch is not None:
        weights, seed = "random", options.seed
        checkpoint = random_checkpoint(options.arch, config, seed=seed, **given)
    else:
        shipped = DEMONSTRATIONS[options.task or "classification"]
        weights, checkpoint = "demonstration", load_checkpoint(shipped.checkpoint, None, config, **given)
        images = images or tuple(list_images(shipped.samples))
        folder = folder or shipped.calibration
    own = checkpoint.config.task
    if options.task not in (None, own):
        expected = " or ".join([own, *tasks])
        raise UsageError(f"`task` {options.task} for {checkpoint.arch}, which is for {own}; expected `task` {expected}")
    checkpoint = replace(checkpoint, open_size=options.open_size)
    return Network(checkpoint, weights, seed, images, _calibration(folder, checkpoint))


def _given_preprocessing(options: ExportOptions) -> dict[str, Any]:
    """What the options say of preprocessing and classes, by the arguments of :func:`load_checkpoint`."""
    fields = {
        name: getattr(options, name)
        for name in ("mean", "std", "interpolation", "crop_fraction")
        if getattr(options, name) is not None
    }
    if options.channel_order is not None:
        fields["channels"] = options.channel_order.upper()
    return {
        "image_size": options.image_size,
        "preprocessing": fields,
        "description": None if options.preprocessing is None else read_description(Path(options.preprocessing)),
        "classes": () if options.classes is None else read_class_names(Path(options.classes)),
    }


def _calibration(folder: str | Path | None, checkpoint: Checkpoint) -> ImageSet | None:
    config = checkpoint.config
    if folder is None or config.task == "features":
        return None
    measure = measure_of(config.task, config.num_classes)
    return measure.images(Path(folder), checkpoint.preprocessing, checkpoint.classes, "training")


def random_checkpoint(
    arch: str,
    options: Mapping[str, Any],
    image_size: int | None,
    seed: int,
    preprocessing: Mapping[str, Any] | None = None,
    description: InputDescription | None = None,
    classes: Sequence[str] = (),
) -> Checkpoint:
    """Untrained weights, loud enough for parity checks to mean something; the arguments as for :func:`load_checkpoint`.

    Raises:
        UsageError: no such architecture or option, or a preprocessing or names that do not fit it.
    """
    with torch.device("meta"):  # lively_ writes every value, so that nothing needs to be drawn before
        model = create_model(arch, **options)
    room = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in model.state_dict().items()}
    model.load_state_dict(room, assign=True)
    lively_(model, seed)
    given = dict(preprocessing or {}) | ({} if image_size is None else {"image_size": image_size})
    usual = default_preprocessing(model.config).with_fields(description.fields if description else {})
    named = checked_classes(classes, model.config)
    return Checkpoint(arch, model.config, model.state_dict(), usual.with_fields(given), named)


def count_macs(model: nn.Module, image_size: int) -> int:
    """Multiply-accumulates of convolutions and linear layers for one image of ``image_size`` pixels a side.

    The network is run once, on the device of its weights; on ``meta`` nothing is computed.
    ``torch.utils.flop_counter`` finds the same, but brings in the compiler, which takes longer to import than the
    network takes to trace.
    """
    total = 0

    def add(layer: nn.Conv2d | nn.Linear, _: object, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(add) for layer in layers]
    first = next((layer.in_channels for layer in layers if isinstance(layer, nn.Conv2d)), 3)
    try:
        with torch.inference_mode():
            model(torch.zeros(1, first, image_size, image_size, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return total
