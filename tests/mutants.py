"""Files changed at random, by a seed; and, run as a program, what the command line makes of bundles with them.

Engines may crash on such files, so the program runs in a process of its own, with bounded memory:

    python -m tests.mutants BUNDLE COMMAND KIND FIRST LAST

prints a line of JSON for each mutant; the last one is missing where it ended the process.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ONNX = "onnx/fp32/model.onnx"
# By kind of the mutant, the file that is changed.
FILES = {
    "graph": ONNX,
    "onnx": ONNX,
    "xml": "openvino/fp32/model.xml",
    "numbers": "ncnn/fp32/model.param",
    "param": "ncnn/fp32/model.param",
    "bin": "ncnn/fp32/model.bin",
    "tflite": "litert/fp32/model.tflite",
}
EXTREME = (0, -1, 1, 2, 3, 7, -(2**31), 2**31 - 1, 2**31, 2**62, -(2**63), 2**63 - 1, 65536)
OPERATORS = ("Conv", "Add", "Reshape", "Gemm", "Concat", "Slice", "Loop", "If", "Resize", "MaxPool", "Gather", "Cast")
_MEMORY = 8 << 30


def changed_bytes(data: bytes, generator: random.Random, positions: Sequence[int] | None = None) -> bytes:
    """A few bytes exchanged, a piece cut out or doubled, or the end cut off."""
    changed = bytearray(data)
    places = positions or range(len(data))
    kind = generator.randrange(8)
    at = generator.choice(places)
    if kind < 5:
        for _ in range(generator.choice((1, 1, 2, 5))):
            changed[generator.choice(places)] = generator.randrange(256)
    elif kind == 5:
        changed[at] ^= 1 << generator.randrange(8)
    elif kind == 6:
        length = generator.randrange(1, 40)
        changed[at : at + length] = bytes(changed[at : at + length]) * generator.choice((0, 2))
    else:
        del changed[at:]
    return bytes(changed)


def changed_json(content: Any, generator: random.Random) -> None:
    """One value somewhere inside is dropped, doubled, or exchanged for another."""
    where = content
    while True:
        keys: list[Any] = list(where) if isinstance(where, dict) else list(range(len(where)))
        key = generator.choice(keys)
        if isinstance(where[key], (dict, list)) and where[key] and generator.random() < 0.85:
            where = where[key]
            continue
        break
    others = (None, True, -1, 0, 1e308, 10**30, "", "x" * 5000, "..", "\u0000", "\ud800", [], {}, [[]], {"a": 1})
    if generator.random() < 0.2:
        del where[key]
    else:
        where[key] = generator.choice(others)


def outside_weights(data: bytes) -> list[int]:
    """Positions of an ONNX file that are no values of weights."""
    import onnx

    free = bytearray(b"\1" * len(data))
    for tensor in onnx.load_from_string(data).graph.initializer:
        if len(tensor.raw_data) > 64:
            at = data.find(tensor.raw_data)
            free[at : at + len(tensor.raw_data)] = bytes(len(tensor.raw_data))
    return [position for position, is_free in enumerate(free) if is_free]


def changed_graph(data: bytes, generator: random.Random) -> bytes:
    """A whole ONNX file of a graph that makes no sense: sizes, types, operators and connections exchanged."""
    import onnx

    model = onnx.load_from_string(data)
    graph = model.graph
    names = [name for node in graph.node for name in node.output] + [tensor.name for tensor in graph.initializer]
    for _ in range(generator.choice((1, 1, 2, 4))):
        kind, node, tensor = generator.randrange(9), generator.choice(graph.node), generator.choice(graph.initializer)
        lists = [attribute.ints for each in graph.node for attribute in each.attribute if attribute.ints]
        if kind < 3:
            numbers = generator.choice(lists)
            numbers[generator.randrange(len(numbers))] = generator.choice(EXTREME)
        elif kind == 3 and tensor.dims:
            tensor.dims[generator.randrange(len(tensor.dims))] = generator.choice(EXTREME)
        elif kind == 4:
            tensor.data_type = generator.randrange(25)
        elif kind == 5:
            node.op_type = generator.choice(OPERATORS)
        elif kind == 6:
            sizes = generator.choice((*graph.input, *graph.output)).type.tensor_type.shape.dim
            generator.choice(sizes).dim_value = generator.choice(EXTREME)
        elif kind == 7 and node.input:
            node.input[generator.randrange(len(node.input))] = generator.choice(names)
        else:
            graph.node.remove(node)
    whole: bytes = model.SerializeToString()
    return whole


def changed_numbers(data: bytes, generator: random.Random) -> bytes:
    """A file of ncnn's layers in which parameters have other values."""
    words = data.split(b" ")
    for _ in range(generator.choice((1, 1, 2, 4))):
        at = generator.choice([place for place, word in enumerate(words) if b"=" in word])
        name, _, value = words[at].partition(b"=")
        rest = value[len(value.split(b"\n")[0]) :]
        words[at] = name + b"=" + str(generator.choice(EXTREME)).encode() + rest
    return b" ".join(words)


def mutator(kind: str, data: bytes) -> Callable[[random.Random], bytes]:
    """What makes a mutant of a file: ``graph``, ``onnx`` and ``numbers`` know what it is, other kinds change bytes."""
    if kind == "graph":
        return lambda generator: changed_graph(data, generator)
    if kind == "numbers":
        return lambda generator: changed_numbers(data, generator)
    positions = outside_weights(data) if kind == "onnx" else None
    return lambda generator: changed_bytes(data, generator, positions)


def mutate(bundle: Path, kind: str, number: int, make: Callable[[random.Random], bytes]) -> None:
    """Put a mutant into the bundle, under a hash that fits."""
    from tests.bundles import adopt

    name = FILES[kind]
    (bundle / name).write_bytes(make(random.Random(f"{kind} {number}")))
    adopt(bundle, name)


def command_line(arguments: list[str]) -> tuple[int, str]:
    """Exit code, and what was written to both outputs, by native code as well."""
    from dmformer.cli import main

    sys.argv = ["dmformer", *arguments]
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
        sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(os.dup(n), "wb", 0), write_through=True) for n in (1, 2))
        code: Any = None
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        finally:
            for number, stream in zip((1, 2), kept, strict=True):
                os.dup2(stream, number)
                os.close(stream)
            sys.stdout.close()
            sys.stderr.close()
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        said.seek(0)
        return code, said.read().decode(errors="replace")


def run(bundle: Path, arguments: list[str], kind: str, first: int, last: int) -> None:
    """Print what became of each mutant."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    make = mutator(kind, (bundle / FILES[kind]).read_bytes())
    for number in range(first, last):
        mutant = bundle.parent / "mutant"
        shutil.rmtree(mutant, ignore_errors=True)
        shutil.copytree(bundle, mutant)
        mutate(mutant, kind, number, make)
        code, said = command_line([argument.replace("BUNDLE", str(mutant)) for argument in arguments])
        sys.stdout.write(json.dumps({"number": number, "code": code, "said": said}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
