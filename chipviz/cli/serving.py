"""The command that serves a bundle, or several chips on one backbone, over HTTP."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chipviz.bundle.metadata import read_metadata
from chipviz.bundle.tasks import is_joined, read_joined
from chipviz.cli import printing
from chipviz.data.task import refuse_kind
from chipviz.errors import ConfigError

if TYPE_CHECKING:
    from fastapi import FastAPI

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE")],
    host: Annotated[str, typer.Option(help="Address to answer at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to answer at.", min=0, max=65_535)] = 8100,
    api_key_env: Annotated[
        str | None, typer.Option(help="Name of the variable that holds the key of requests.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds that a request may take.", min=0.1)
    ] = 60.0,
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="Let texts leave at the bundle's early exits.")
    ] = False,
) -> None:
    """Answer requests over HTTP: /predict, /classify, /health, /metrics, /docs."""
    key = os.environ.get(api_key_env, "") if api_key_env else None
    if key == "":
        raise ConfigError(f"The variable {api_key_env} is empty.", "Set it to the key.")
    if key is None and host not in LOOPBACK:
        printing.show(
            "warning: whoever reaches this machine may ask; see --api-key-env", sys.stderr
        )
    hosts = [*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"]
    app = _service(bundle, adaptive=adaptive)(
        name=bundle.resolve().name, key=key, hosts=hosts, timeout_s=timeout
    )
    from chipviz.bundle.listening import run

    printing.show(f"http://{host}:{port} answers; /docs says what. Stop with Ctrl-C.", sys.stderr)
    run(app, host, port)


def _service(bundle: Path, *, adaptive: bool) -> "Callable[..., FastAPI]":
    """What makes the service of a bundle, or of a joined folder."""
    if is_joined(bundle):
        if adaptive:
            raise ConfigError("Several tasks on one backbone are read whole.", "No --adaptive.")
        from chipviz.bundle import serve_joined

        tasks = read_joined(bundle)
        pair = serve_joined.refuse_mixed(tasks)
        return partial(serve_joined.make_app, tasks, serve_joined.open_batcher(bundle, pair=pair))
    metadata = read_metadata(bundle)
    refuse_kind(metadata.task.kind, "text")
    from chipviz.bundle import serve

    batcher = serve.open_batcher(bundle, pair=metadata.takes_pair, adaptive=adaptive)
    return partial(serve.make_app, metadata, batcher)


def add_to(app: typer.Typer) -> None:
    """Give this command to the command line."""
    app.command()(serve)
