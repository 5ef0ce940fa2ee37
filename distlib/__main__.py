"""`python -m distlib` is `distlib`."""

from distlib.cli import main

main()
