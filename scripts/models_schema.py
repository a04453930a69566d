"""Make the JSON schema of the catalogue, ``config/models.schema.json``, from the forms that check it.

Usage: models_schema.py [--update]. Without it, only says whether the file is current (exit code 1 when not).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm_bootstrap.models.schema import json_schema

TARGET = Path(__file__).resolve().parent.parent / "config" / "models.schema.json"


def text() -> str:
    """The file as it should be."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def main(args: list[str]) -> int:
    if args == ["--update"]:
        TARGET.write_text(text(), encoding="utf-8")
        return 0
    if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text():
        return 0
    print(f"{TARGET.name} is not current: run scripts/models_schema.py --update", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
