"""``python -m companion``: the command line, where the package is not installed but on the path."""

from companion.cli import main

main()
