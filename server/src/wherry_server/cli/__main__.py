"""`python -m wherry_server.cli`."""

from wherry_server.cli import main

main()
