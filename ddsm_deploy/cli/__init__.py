"""The command `ddsm`: commands parse, call the library, and render; nothing is computed here.

Each command's module imports the library inside its function, so that `ddsm --help` stays instant.
"""

from __future__ import annotations

import sys

import typer

from ddsm_deploy.errors import DdsmError

app = typer.Typer(
    name="ddsm",
    help="Train, export and run semantic segmentation networks with the Dynamic Dual Sampling Module.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,  # a bug keeps its plain traceback
    rich_markup_mode=None,
)

INTERRUPTED = 130


def _register() -> None:
    from ddsm_deploy.cli import bench, evaluate, export, info, segment, train

    app.command("train")(train.train)
    app.command("export")(export.export)
    app.command("segment")(segment.segment)
    app.command("eval")(evaluate.evaluate)
    app.command("bench")(bench.bench)
    app.command("info")(info.info)


_register()


def main() -> None:
    """Entry point: one line on stderr and a documented exit code for every error made on purpose."""
    try:
        app()
    except DdsmError as exc:
        print(f"ddsm: {exc}", file=sys.stderr)
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        print("ddsm: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away, as `| head` does
        sys.exit(0)
