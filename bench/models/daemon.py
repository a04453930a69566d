"""The daemon, with a clock at each of the keeper's looks: ``python -m bench.models.daemon``.

Appends one line of JSON for each plan to ``looks.jsonl`` in its working directory: the CPU time of the event loop's
thread that parts of the look took, in microseconds (nothing else can run on the loop meanwhile), and how many models
were wanted. The configuration comes from the environment, as ever.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_bootstrap import app
from vllm_bootstrap.models import gathering, keeper, planning
from vllm_bootstrap.models.keeper import Keeper
from vllm_bootstrap.settings import Settings


class Clock:
    """Times spent since the last plan, by part."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)
        self._spent: dict[str, float] = {}

    def around(self, part: str, function: Callable[..., Any], *, ends: bool = False) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **named)
            finally:
                self._spent[part] = self._spent.get(part, 0.0) + (time.thread_time() - began) * 1e6
                if ends:
                    self._file.write(json.dumps({"wanted": _wanted(args[0]), **self._spent}) + "\n")
                    self._spent = {}

        return timed


def _wanted(facts: list[planning.Facts]) -> int:
    return sum(fact.wanted is not None for fact in facts)


def main() -> None:
    clock = Clock(Path("looks.jsonl"))
    vars(keeper)["needs_of"] = clock.around("needs", gathering.needs_of)
    vars(planning)["plan"] = clock.around("plan", planning.plan, ends=True)
    facts = clock.around("facts", Keeper._facts)  # noqa: SLF001 - there is no other place to hold a clock to
    Keeper._facts = facts  # type: ignore[method-assign]  # noqa: SLF001
    raise SystemExit(app.serve(Settings()))


if __name__ == "__main__":
    main()
