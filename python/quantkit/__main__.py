"""`python -m quantkit` is the `quantkit` command."""

import sys

from .cli import main

sys.exit(main())
