"""`python -m adacache`."""

import sys

from adacache.cli import main

sys.exit(main())
