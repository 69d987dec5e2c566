"""The command `ddsm`: commands parse, call the library, and render; nothing is computed here.

Each command's module imports the library inside its function, so that `ddsm --help` stays instant.

Exit codes: 0 done, 1 an error made on purpose (`DdsmError`), 2 usage, 3 a gate failed, 130 interrupted. A bug keeps its
traceback.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
import typer.core

from ddsm_deploy.cli import (
    bench,
    build,
    bundle,
    deploy,
    evaluate,
    export,
    info,
    quantize,
    ros2,
    segment,
    serve,
    train,
    tune,
    verify,
)
from ddsm_deploy.errors import DdsmError

INTERRUPTED = 130


class _Group(typer.core.TyperGroup):
    """Ends a command on Ctrl-C, and when the reader of its output goes away as `| head` does, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a reader that has gone shows here, not while the interpreter shuts down
            return result
        except KeyboardInterrupt:
            print("ddsm: interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None  # as typer does where it meets this itself


app = typer.Typer(
    name="ddsm",
    help="Train, export and run semantic segmentation networks with the Dynamic Dual Sampling Module.",
    cls=_Group,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,  # a bug keeps its plain traceback
    rich_markup_mode=None,
)
app.command("train")(train.train)
app.command("export")(export.export)
app.command("quantize")(quantize.quantize)
app.command("build")(build.build)
app.command("bundle")(bundle.bundle)
app.add_typer(deploy.app, name="deploy")
app.command("segment")(segment.segment)
app.command("ros2")(ros2.ros2)
app.command("serve")(serve.serve)
app.command("eval")(evaluate.evaluate)
app.command("verify")(verify.verify)
app.command("bench")(bench.bench)
app.command("tune")(tune.tune)
app.command("info")(info.info)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"ddsm-deploy {version('ddsm-deploy')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options that stand before any command."""


def main() -> None:
    """Entry point: one line on stderr and a documented exit code for every error made on purpose."""
    try:
        app()
    except DdsmError as exc:
        print("ddsm:", " ".join(str(exc).split("\n")), file=sys.stderr)
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:  # while the commands were still being read
        sys.exit(INTERRUPTED)
