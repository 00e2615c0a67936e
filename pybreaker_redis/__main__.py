"""The command line: ``python -m pybreaker_redis``."""

from __future__ import annotations

import sys

from pybreaker_redis.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
