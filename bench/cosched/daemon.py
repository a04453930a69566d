"""The daemon with some levers of its batch budget out of force: ``python -m bench.cosched.daemon FILE``.

FILE holds the names of ``BudgetPolicy`` fields to switch off, separated by blanks; an empty one changes nothing. The
rest of the configuration comes from the environment, as ever.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from vllm_bootstrap import app
from vllm_bootstrap.configure import budget_policy
from vllm_bootstrap.scheduler.budget import BudgetPolicy
from vllm_bootstrap.settings import Settings


def main() -> None:
    off = dict.fromkeys(Path(sys.argv[1]).read_text().split(), False)

    def without(settings: Settings) -> BudgetPolicy:
        return replace(budget_policy(settings), **off)

    vars(app)["budget_policy"] = without
    raise SystemExit(app.serve(Settings()))


if __name__ == "__main__":
    main()
