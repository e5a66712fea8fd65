"""A network of one's own: any ``nn.Module``, from a file or at hand, as what an export starts from.

Loading one runs the code of its file, as Python's ``import`` does; nothing but the argument ``module`` asks for that.
What the network takes and gives is found by asking it: an image of noise in, and the shapes of what comes out.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dmformer.data.description import InputDescription, description_beside
from dmformer.errors import UsageError, first_line
from dmformer.files import hash_file, indented_json
from dmformer.models.checkpoint import Checkpoint, checked_classes, decide_input, load_weights_, sigmoid_note
from dmformer.models.checkpoint_file import title_of
from dmformer.models.program import load_program
from dmformer.models.specification import ModuleOrigin
from dmformer.models.user_code import import_named, make_network, running_user_code, unwrapped
from dmformer.process import printing_to_stderr
from dmformer.task import FEATURE_NAMES, INPUT_NAME, OUTPUT_NAME, STRIDES, Task

_USUAL_SIZE = 224
_PROBE_BATCH = 2
_PROBE_SEED = 7
# Names under which networks that give a dictionary have their logits; the rest of it is for training.
_LOGITS = (OUTPUT_NAME, "out")
_FEWEST_REPEATED = 3  # of a class among others, to make a list of blocks
_SAME_ANSWER = 1e-3  # of the largest value; a kernel may add in another order for another batch


@dataclass(frozen=True)
class OwnSpecification:
    """What a network of one's own takes and gives, as it showed when it was asked.

    Attributes:
        task: what its outputs mean.
        in_channels: channels of its input image.
        num_classes: channels of its logits; 0 for task ``features``.
        outputs: shape of each output for one image of the preprocessing's size, without the batch, by name.
        sources: where each output is in what the network returns, by the names that it has there.
        blocks: names of the modules that are judged one by one for int8.
        origin: where it came from.
        template: the network itself, which is copied and never run.
    """

    task: Task
    in_channels: int
    num_classes: int
    outputs: Mapping[str, tuple[int, ...]]
    sources: tuple[str, ...]
    blocks: tuple[str, ...]
    origin: ModuleOrigin
    template: InitVar[nn.Module]

    def __post_init__(self, template: nn.Module) -> None:
        object.__setattr__(self, "_template", template)  # no field: what is encoded and compared is without it

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of what it gives, in order."""
        return tuple(self.outputs)

    def output_shapes(self, height: int, width: int) -> tuple[tuple[int, ...], ...]:  # noqa: ARG002 - the contract's
        """Return the shapes of the outputs at the size at which the network was asked, whatever size is given."""
        return tuple(self.outputs.values())

    def to_dict(self) -> dict[str, Any]:
        """Return what describes the network, as a dictionary of JSON types."""
        shapes = {name: list(shape) for name, shape in self.outputs.items()}
        return {
            "task": self.task, "in_channels": self.in_channels, "num_classes": self.num_classes, "outputs": shapes
        }  # fmt: skip

    def build(self, state: Mapping[str, Tensor]) -> nn.Module:
        """Return a copy of the network with these weights, in evaluation mode, which gives its outputs by name."""
        model: nn.Module = copy.deepcopy(self._template)  # type: ignore[attr-defined]
        model.load_state_dict(state)
        names = tuple(zip(self.outputs, self.sources, strict=True))

        def by_name(_module: nn.Module, _given: object, result: object) -> dict[str, Tensor]:
            found = _tensors(result)
            return {name: found[source] for name, source in names}

        model.register_forward_hook(by_name)
        return model.eval()

    def block_of(self, node: str) -> str | None:
        """Return the block that an ONNX node belongs to, by the node's name ``MODULE/OPERATOR``."""
        module = node.rpartition("/")[0]
        return next((block for block in self.blocks if module == block or module.startswith(f"{block}.")), None)


@dataclass(frozen=True)
class OwnNetwork:
    """A network of one's own with its weights, and whether these were drawn at random when it was made."""

    checkpoint: Checkpoint
    random: bool


def load_own(
    module: str | nn.Module | Path,
    options: Mapping[str, Any] | None = None,
    weights: Path | None = None,
    image_size: int | None = None,
    seed: int = 0,
    weights_key: str | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    description: InputDescription | None = None,
    classes: Sequence[str] = (),
) -> OwnNetwork:
    """Load a network of one's own and find out what it takes and gives. Its code is run.

    Args:
        module: ``FILE.py:NAME`` or ``package.module:NAME``, where NAME is a function or a class that makes the network,
            or the network itself; or an ``nn.Module``, which is left as it is; or the file of a program of
            ``torch.export``, which has its weights in it and of which nothing is run.
        options: arguments of the function or class.
        weights: a file with weights that fit exactly; without it the network keeps those that it comes with.
        image_size: side of the input in pixels; otherwise 224.
        seed: of the weights that the network draws when it is made.
        weights_key: where in the file the weights are, where it holds several sets.
        preprocessing: fields of :class:`Preprocessing` that are known, in JSON types.
        description: what another library's file says of the preprocessing.
        classes: a name for each output.

    Raises:
        UsageError: it cannot be imported or made, the weights do not fit, or it is no network that takes a batch of
            images and gives logits or maps; the message says what to do.
    """
    title, random = f"module {_shown(module)}", False
    _check_writable(options or {})
    notes: list[str] = []
    sha256, channels, found = None, None, None
    if isinstance(module, Path):
        title, reference, source = title_of(module), module.name, None
        program = load_program(module)
        network, channels, image_size = program.network, program.channels, image_size or program.image_size
        sha256 = hash_file(module)[0]
    elif isinstance(module, str):
        found, source = import_named(module, title)
        network = make_network(found, dict(options or {}), title, seed)
        where, _, name = module.rpartition(":")
        reference = f"{Path(where).name if where.endswith('.py') else where}:{name}"
    else:
        if options:
            raise UsageError(f"`module_options` for {title}, which is made already; expected none")
        network = unwrapped(module)
        reference, source = f"{type(network).__module__}:{type(network).__qualname__}", _source_file(type(network))
    first, network = network, _prepared(network, title, notes)
    if found is not None and weights is None and not isinstance(found, nn.Module):
        random = not _equal(first, make_network(found, dict(options or {}), title, seed + 1))
    if weights is not None:
        sha256, read = load_weights_(network, weights, title, weights_key)
        notes += read
    elif not random and sha256 is None:
        notes.append(f"no checkpoint was given: the weights are those that {title} comes with")
    _fold_parametrizations_(network)
    if image_size is None:
        notes.append(f"nothing tells the size of the input: {_USUAL_SIZE} pixels a side were assumed")
    size = image_size or _USUAL_SIZE
    channels = channels or _input_channels(network)
    task, outputs, sources = _asked(network, (_PROBE_BATCH, channels, size, size), title, notes)
    origin = ModuleOrigin(
        reference=reference,
        options=dict(options or {}),
        source_sha256=hashlib.sha256(source.read_bytes()).hexdigest() if source is not None else None,
    )
    count = 0 if task == "features" else next(iter(outputs.values()))[0]
    specification = OwnSpecification(task, channels, count, outputs, sources, tuple(_blocks(network)), origin, network)
    given = {**(preprocessing or {}), "image_size": size}
    file = module if isinstance(module, Path) else weights
    beside = description_beside(file) if description is None and file is not None else description
    decided, named = decide_input(specification, None, beside, given, notes)
    notes += sigmoid_note(specification)
    checkpoint = Checkpoint(
        arch=module.stem if isinstance(module, Path) else type(network).__name__,
        config=specification,
        state=network.state_dict(),
        preprocessing=decided,
        classes=checked_classes(classes or named, specification),
        sha256=sha256,
        notes=tuple(notes),
    )
    return OwnNetwork(checkpoint, random)


def _check_writable(options: Mapping[str, Any]) -> None:
    """Refuse arguments that no manifest could hold.

    Raises:
        UsageError: one is no text, number, truth value, or list or dictionary of these.
    """
    for name, value in options.items():
        try:
            indented_json(value)  # as the manifest has it
            msgspec.msgpack.encode(value)  # as the keys of the cache have it
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise UsageError(
                f"`module_options` {name}: {first_line(error)}; expected what JSON can hold, or the network itself as "
                "`module`, made with it"
            ) from error


def _shown(module: str | nn.Module | Path) -> str:
    return repr(str(module)) if isinstance(module, (str, Path)) else type(module).__name__


def _equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(value.cpu(), theirs[name].cpu()) for name, value in ours.items() if name in theirs)


def _source_file(kind: type) -> Path | None:
    try:
        file = inspect.getsourcefile(kind)
    except (TypeError, OSError):
        return None
    return Path(file) if file and Path(file).is_file() else None


def _prepared(network: nn.Module, title: str, notes: list[str]) -> nn.Module:
    """Return a copy on the CPU, in float32 and in evaluation mode."""
    if isinstance(network, torch.jit.ScriptModule):
        raise UsageError(f"{title} is TorchScript; expected the nn.Module that it was made from")
    weights = [*network.parameters(), *network.buffers()]
    if not any(True for _ in network.parameters()):
        raise UsageError(f"{title} has no parameters; expected a network with weights")
    if any(map(nn.parameter.is_lazy, weights)):
        raise UsageError(f"{title} has weights whose shapes its first image decides; expected a network that has run")
    if any(weight.is_meta for weight in weights):
        raise UsageError(f"{title} has weights without values (device meta); expected weights on the CPU")
    if elsewhere := sorted({str(weight.device) for weight in weights if weight.device.type != "cpu"}):
        notes.append(f"the network was on {', '.join(elsewhere)}, and was copied to the CPU")
    types = {str(one.dtype).removeprefix("torch.") for one in weights if one.is_floating_point()} - {"float32"}
    if types:
        notes.append(f"weights of type {', '.join(sorted(types))} were converted to float32")
    try:
        copied = copy.deepcopy(network)
    except Exception as error:
        raise UsageError(
            f"{title} cannot be copied: {first_line(error)}; expected plain modules, without what "
            "torch.nn.utils.remove_weight_norm and remove_spectral_norm remove"
        ) from error
    return copied.cpu().float().eval().requires_grad_(False)


def _fold_parametrizations_(network: nn.Module) -> None:
    """Put weights that are computed anew each time (weight norm, spectral norm) where they are used, in place."""
    for module in network.modules():
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name)
    network.requires_grad_(False)


def _input_channels(network: nn.Module) -> int:
    """Return 1 where the convolution that was registered first takes that, or a spatial one does and none takes 3.

    Otherwise it is 3; asking the network tells whether that is right.
    """
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    spatial = {conv.in_channels for conv in convolutions if conv.groups == 1 and conv.kernel_size != (1, 1)}
    first = [conv.in_channels for conv in convolutions[:1]]
    return 1 if first == [1] or (1 in spatial and 3 not in spatial) else 3


def _tensors(result: object, name: str = "") -> dict[str, Tensor]:
    """Return every tensor of what a network returned, by the keys and positions that lead to it."""
    if isinstance(result, Tensor):
        return {name: result}
    items: list[tuple[object, object]]
    if isinstance(result, Mapping):
        items = list(result.items())
    elif isinstance(result, (list, tuple)):
        items = list(enumerate(result))
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, value in items:
        found |= _tensors(value, f"{name}_{key}" if name else str(key))
    return found


def _asked(
    network: nn.Module, shape: tuple[int, int, int, int], title: str, notes: list[str]
) -> tuple[Task, dict[str, tuple[int, ...]], tuple[str, ...]]:
    """Ask a network with noise; gives its task, its outputs' shapes by name, and where they are in what it returns."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(_PROBE_SEED))
    answer = _answers_to(network, shape, title)
    result = answer(noise)
    found = _tensors(result)
    if not found:
        raise UsageError(f"{title} gives {type(result).__name__}; {_EXPECTED}")
    again, single = _tensors(answer(noise)), _tensors(answer(noise[:1]))
    if not all(torch.equal(found[name], again[name]) for name in found):
        raise UsageError(
            f"{title} answers the same image differently each time, in evaluation mode; expected one answer: let "
            "dropout and the like ask self.training"
        )
    if not all(_rows_agree(found[name], single.get(name)) for name in found):
        raise UsageError(
            f"{title} answers an image differently beside others, in evaluation mode; expected one answer: let "
            "BatchNorm use its running statistics, and keep the batch in the first dimension"
        )
    _refuse_decisions(network, noise, title)
    chosen = _chosen(found, title, notes)
    task, names = _task(chosen, shape[2], isinstance(result, Mapping), title, notes)
    outputs = {name: tuple(tensor.shape[1:]) for name, tensor in zip(names, chosen.values(), strict=True)}
    return task, outputs, tuple(chosen)


_EXPECTED = (
    "expected logits (N, classes), maps (N, classes, H, W) of the input's height and width, or a tuple or dictionary "
    "of maps (N, channels, h, w)"
)


def _answers_to(network: nn.Module, shape: tuple[int, ...], title: str) -> Callable[[Tensor], object]:
    asked = copy.deepcopy(network)

    def answer(images: Tensor) -> object:
        when = f"when it was asked with {shape[1]} channels of {shape[2]} pixels a side"
        expected = (
            f"a network that takes (N, {', '.join(map(str, shape[1:]))}) on the CPU: `image_size` tells the size it is "
            "made for"
        )
        with running_user_code(title, when, expected), torch.no_grad():
            return asked(images)

    return answer


def _rows_agree(batch: Tensor, single: Tensor | None) -> bool:
    """Whether the first row of a batch's answer is that to the image alone."""
    if single is None or batch.ndim == 0 or batch.shape[1:] != single.shape[1:] or len(batch) != _PROBE_BATCH:
        return False
    if not batch.is_floating_point():
        return torch.equal(batch[:1], single)
    return float((batch[:1] - single).abs().max()) <= _SAME_ANSWER * float(batch.abs().max())


def _refuse_decisions(network: nn.Module, images: Tensor, title: str) -> None:
    """Refuse a network that decides by the values of tensors: tensors without values tell.

    Raises:
        UsageError: it does.
    """
    try:
        with torch.no_grad(), printing_to_stderr():
            copy.deepcopy(network).to("meta")(images.to("meta"))
    except Exception as error:  # what has a device of its own in its code fails here, and may be right
        if not re.search(r"item\(\)|nonzero|data-dependent", str(error)) or "meta" not in str(error):
            return
        raise UsageError(
            f"{title} decides by the values of a tensor ({first_line(error)}); expected the same operations for every "
            "image: a traced file has one way through the network"
        ) from error


def _chosen(found: dict[str, Tensor], title: str, notes: list[str]) -> dict[str, Tensor]:
    """Return the outputs to export: where one is named logits, that alone."""
    for name in _LOGITS:
        if name in found:
            if len(found) > 1:
                left_out = ", ".join(other for other in found if other != name)
                notes.append(f"{title} gives {name} and {left_out}: {name} was taken")
            return {name: found[name]}
    return found


def _task(
    found: dict[str, Tensor], size: int, by_key: bool, title: str, notes: list[str]
) -> tuple[Task, tuple[str, ...]]:
    """Return what a network is for, and the names of its outputs, by their shapes."""
    shapes = [tuple(tensor.shape) for tensor in found.values()]
    floats = all(tensor.dtype == torch.float32 for tensor in found.values())
    if len(shapes) == 1 and floats and len(shapes[0]) == 2:
        return "classification", (OUTPUT_NAME,)
    if len(shapes) == 1 and floats and shapes[0][2:] == (size, size):
        return "segmentation", (OUTPUT_NAME,)
    if not floats or any(len(shape) != 4 for shape in shapes):
        given = ", ".join(f"{name or 'a tensor'} {_described(one)}" for name, one in list(found.items())[:6])
        raise UsageError(f"{title} gives {given}; {_EXPECTED}")
    if len(shapes) == 1:
        notes.append(
            f"{title} gives one map {shapes[0]}, smaller than its input: it was taken for features; for segmentation "
            "enlarge it in the network"
        )
    if by_key:
        names = tuple(re.sub(r"\W", "_", name) for name in found)
        if len({*names, INPUT_NAME}) == len(names) + 1:
            return "features", names
    if [size // shape[2] for shape in shapes] == [*STRIDES]:
        return "features", FEATURE_NAMES
    return "features", tuple(f"features_{index}" for index in range(len(shapes)))


def _described(tensor: Tensor) -> str:
    """Write the shape of a tensor, and its type where it has numbers of another precision than float32."""
    is_other = tensor.is_floating_point() and tensor.dtype != torch.float32
    kind = "" if not is_other else f" of type {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"


def _blocks(network: nn.Module) -> Iterator[str]:
    """Yield the names of the blocks of a network: what is repeated in its lists, and what is beside these lists."""

    def walk(module: nn.Module, path: str) -> Iterator[str]:
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            if any(map(_is_list_of_blocks, child.modules())):
                yield from walk(child, inner)
            elif any(True for _ in child.parameters()):
                yield inner

    return walk(network, "")


def _is_list_of_blocks(module: nn.Module) -> bool:
    """Whether the children of a list are of one class, or several of them, which has modules of its own."""
    children = dict(module.named_children())
    numbered = list(children) == [str(index) for index in range(len(children))]
    if not isinstance(module, nn.Sequential) and not numbered:  # of a program's modules the names alone are left
        return False
    kinds = Counter(type(child) for child in children.values() if any(True for _ in child.children()))
    most = max(kinds.values(), default=0)
    return most > 0 and (most == len(children) or most >= _FEWEST_REPEATED)
