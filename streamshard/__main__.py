"""`python -m streamshard`."""

from streamshard.cli import main

main()
