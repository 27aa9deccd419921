"""`python -m adacache`."""

import sys

from adacache.commands.cli import main

sys.exit(main())
