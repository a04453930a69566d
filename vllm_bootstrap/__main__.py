"""``python -m vllm_bootstrap``: the same as the command ``vllm-bootstrap``."""

from __future__ import annotations

import sys

from vllm_bootstrap.cli import main

if __name__ == "__main__":
    sys.exit(main())
