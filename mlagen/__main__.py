"""`python -m mlagen` is `mlagen`."""

from mlagen.cli import main

main()
