"""`python -m vlmc` is the command `vlmc`."""

from .cli import main

main()
