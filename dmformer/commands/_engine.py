"""Options of formats that are compiled, for the commands that make them."""

from __future__ import annotations

from typing import Annotated

import typer

FlavourOption = Annotated[
    str,
    typer.Option(
        "--flavour",
        metavar="NAME",
        help="Of TensorRT: tensorrt (10 or 11), rtx (TensorRT-RTX), or auto.",
    ),
]
TargetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="SM",
        help="GPU to build TensorRT engines for ahead of time, like sm89; otherwise this machine's. Repeatable.",
    ),
]
MinBatchOption = Annotated[int, typer.Option("--min-batch", min=1, help="Smallest batch of a TensorRT engine.")]
OptBatchOption = Annotated[int, typer.Option("--opt-batch", min=1, help="Batch that a TensorRT engine is tuned for.")]
MaxBatchOption = Annotated[int, typer.Option("--max-batch", min=1, help="Largest batch of a TensorRT engine.")]
WorkspaceOption = Annotated[
    int | None,
    typer.Option("--workspace", metavar="MIB", min=1, help="Most GPU memory for one layer's work, in MiB."),
]
