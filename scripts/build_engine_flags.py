"""Make the capability table ``vllm_bootstrap/engines/data/vllm_flags.json`` from the recorded flags of each version.

Reads ``tests/fixtures/engine_flags/VERSION.txt`` (see ``record_engine_flags.py``; the first line says where the list
comes from). The table keeps, for each flag, from which version on it takes its value in which way; null from where it
is gone. Only a list recorded from an installed release counts as verified.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "tests/fixtures/engine_flags"
TABLE = ROOT / "vllm_bootstrap/engines/data/vllm_flags.json"
INSTALLED = "as installed"


def sort_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def read(path: Path) -> tuple[str, dict[str, str]]:
    """Where a list comes from, and flag to kind."""
    first, *lines = path.read_text().splitlines()
    return first.removeprefix("# "), dict(line.split() for line in lines)


def build() -> tuple[dict[str, dict[str, object]], dict[str, dict[str, str | None]]]:
    """Facts by version, and kinds by version of each flag."""
    recorded = {path.stem: read(path) for path in RECORDED.glob("*.txt") if path.stem.count(".") == 2}
    versions = sorted(recorded, key=sort_key)
    flags: dict[str, dict[str, str | None]] = {}
    for version in versions:
        known = recorded[version][1]
        for name in sorted(known.keys() | flags.keys()):
            changes = flags.setdefault(name, {})
            before = next(reversed(changes.values()), None)
            if known.get(name) != before:
                changes[version] = known.get(name)
    about: dict[str, dict[str, object]] = {
        v: {"verified": INSTALLED in recorded[v][0], "source": recorded[v][0]} for v in versions
    }
    return about, dict(sorted(flags.items()))


def text() -> str:
    """The table as it is committed: one flag a line, so that changes can be read."""
    versions, flags = build()
    lines = ["{", '  "versions": {']
    lines.append(",\n".join(f"    {json.dumps(v)}: {json.dumps(facts)}" for v, facts in versions.items()))
    lines += ["  },", '  "flags": {']
    lines.append(",\n".join(f"    {json.dumps(name)}: {json.dumps(kinds)}" for name, kinds in flags.items()))
    lines += ["  }", "}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text())
    print(f"{TABLE}: {len(json.loads(TABLE.read_text())['flags'])} flags")
