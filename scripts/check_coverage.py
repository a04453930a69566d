"""The coverage gate: combines what the test run measured and fails below the bars. Standard library and coverage only.

Bars: 90 % of lines and branches over the whole package; 100 % in every module that says PURE, because those are the
decisions and need no process, socket or clock to be tried. Exit code 1 names what falls short.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import code_map

OVERALL = 90.0
REPORT = code_map.ROOT / "coverage.json"


def main() -> int:
    subprocess.run([sys.executable, "-m", "coverage", "combine", "-q"], check=False, cwd=code_map.ROOT)
    written = [sys.executable, "-m", "coverage", "json", "-q", "-o", str(REPORT)]
    subprocess.run(written, check=True, cwd=code_map.ROOT)
    report = json.loads(REPORT.read_text())
    pure = [module.path.relative_to(code_map.ROOT) for module in code_map.modules().values() if module.pure]
    problems = shortfalls(report, pure)
    for problem in problems:
        print(f"coverage: {problem}")
    print(f"coverage: {report['totals']['percent_covered']:.1f} % of lines and branches, {len(pure)} pure modules")
    return 1 if problems else 0


def shortfalls(report: Mapping[str, Any], pure: list[Path], overall: float = OVERALL) -> list[str]:
    """One sentence for each bar that is missed. ``report`` is coverage's JSON, ``pure`` paths as it names them."""
    found = []
    total = report["totals"]["percent_covered"]
    if total < overall:
        found.append(f"{total:.1f} % overall, {overall:.0f} % wanted")
    for path in pure:
        entry = report["files"].get(path.as_posix())
        if entry is None:
            found.append(f"{path} is pure and was never imported by a test")
        elif entry["summary"]["percent_covered"] < 100:
            lines = entry["missing_lines"]
            branches = [tuple(pair) for pair in entry.get("missing_branches", [])]
            found.append(f"{path} is pure: lines {lines}, branches {branches} not covered")
    return found


if __name__ == "__main__":
    sys.exit(main())
