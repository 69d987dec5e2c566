"""`python -m ddsm_deploy`: the same as the command `ddsm`."""

from ddsm_deploy.cli import main

main()
