"""``dmformer serve-layout``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dmformer.commands import _options as options
from dmformer.commands import _present as present


def serve_layout(
    server: Annotated[
        str,
        typer.Argument(
            metavar="triton|ovms|web",
            help="NVIDIA Triton; OpenVINO Model Server; any static server: a page that runs the network in browsers.",
        ),
    ],
    bundle: options.BundleArgument = None,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder of the layout.")] = Path("served"),
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            metavar="NAME",
            help="engines (the server's own), or for Triton python: this tool answers, with any runtime of the bundle.",
        ),
    ] = "engines",
    images: Annotated[
        bool,
        typer.Option("--images", help="With --backend python: also models that take files of images and give classes."),
    ] = False,
    max_batch: Annotated[
        int | None,
        typer.Option("--max-batch", min=1, help="Largest batch that Triton makes of waiting requests; otherwise 8."),
    ] = None,
    instances: Annotated[
        int,
        typer.Option(
            "--instances", min=1, help="With --backend python: processes of each model, which share the cores."
        ),
    ] = 1,
    runtimes: options.RuntimeOption = None,
    precisions: options.PrecisionOption = None,
    onnxruntime_web: Annotated[
        Path | None,
        typer.Option(
            "--onnxruntime-web",
            metavar="FILE",
            help="For web: the engine, as npm pack onnxruntime-web writes it; otherwise npm downloads it once.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is not empty.")] = False,
    require_signature: options.RequireSignatureOption = False,
    trusted_keys: options.TrustedKeysOption = None,
    debug: options.DebugOption = False,
) -> None:
    """Write what a server serves: its configuration, the model files, and what clients have to know; or a page."""
    from dmformer.layouts.api import serve_layout as write

    with present.stages() as shown:
        written = write(
            server.lower(),
            options.find_bundle(bundle),
            output,
            force=force,
            backend=backend.lower(),
            images=images,
            max_batch=max_batch,
            instances=instances,
            runtimes=runtimes or [],
            precisions=precisions or [],
            onnxruntime_web=onnxruntime_web,
            stage=shown.stage,
        )
    for name in written.models:
        present.show(str(output / "models" / name))
    if written.note is not None:
        present.say(written.note)
    for reason in written.left_out:
        present.say(f"left out: {reason}")
    page = server.lower() == "web"
    told = "how to serve the page, and what it does" if page else "how to start the server, and what a client has to do"
    present.say(f"{told}: {output / 'README.md'}")
