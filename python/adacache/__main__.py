# SPDX-License-Identifier: Apache-2.0
"""`python -m adacache`."""

import sys

from adacache.commands.cli import main

sys.exit(main())
