"""`ddsm serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddsm_deploy.cli.options import Backend, Fit, Model, Precision, Provider, Sampling


def serve(
    model: Model = "ddsm-lite0",
    backend: Backend = "auto",
    precision: Precision = None,
    sampling: Sampling = None,
    provider: Provider = "cpu",
    fit: Fit = "stretch",
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all, with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 is any free one.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token that clients must show.", show_default="$DDSM_TOKEN")
    ] = None,
    max_bytes: Annotated[str, typer.Option(help="Refuse larger request bodies.")] = "20MB",
    max_pixels: Annotated[int, typer.Option(min=1, help="Refuse larger images.")] = 25_000_000,
    workers: Annotated[int | None, typer.Option(min=1, help="Images worked on side by side; one a core.")] = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests let in beside those; further ones get 503.")] = 16,
    upload_timeout: Annotated[float, typer.Option(help="Seconds for reading a request's body.")] = 10.0,
    timeout: Annotated[float, typer.Option(help="Seconds for waiting and work after that.")] = 30.0,
) -> None:
    """Serve segmentation over HTTP; SIGTERM finishes the requests in hand."""
    import functools
    import sys

    from ddsm_deploy.cli.render import require

    with require("fastapi", backend="fastapi"):
        from ddsm_deploy.serve.limits import Limits, ServeOptions, parse_bytes, read_token
        from ddsm_deploy.serve.server import serve as run
    from ddsm_deploy.runtime.pipeline import open_for_batch

    limits = Limits(
        max_bytes=parse_bytes(max_bytes),
        max_pixels=max_pixels,
        workers=workers,
        queue=queue,
        upload_seconds=upload_timeout,
        seconds=timeout,
    )
    options = ServeOptions(host=host, port=port, token=read_token(token_file), limits=limits)
    if options.open_to_others:
        print(f"warning: {host} lets other machines in, and no token is set (--token-file)", file=sys.stderr)
    opener = functools.partial(
        open_for_batch,
        model,
        backend=backend,
        precision=precision,
        fit=fit,
        workers=limits.threads,
        provider=provider,
        sampling=sampling,
    )
    run(opener, options, say=functools.partial(print, flush=True))
