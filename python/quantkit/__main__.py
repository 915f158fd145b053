"""`python -m quantkit` is the `quantkit` command."""

from .cli import entry

entry()
