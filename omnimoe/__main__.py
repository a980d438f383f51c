"""``python -m omnimoe`` is the command line."""

from __future__ import annotations

import sys

from omnimoe.cli import main

sys.exit(main())
