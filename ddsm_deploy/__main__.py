"""`python -m ddsm_deploy`: the same as the command `ddsm`."""

import sys


def main() -> None:
    """Entry point of both: a Ctrl-C while the command line itself is still loading ends as quietly as any later one."""
    try:
        from ddsm_deploy.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
