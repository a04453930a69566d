"""JSON decoding without surprises: no duplicate keys, no NaN, no half characters, no recursion errors. PURE.

A body with a key twice means one thing to us and another to the next parser, so it is refused instead of guessed at.
"""

from __future__ import annotations

import json
import re
from typing import Any

# Half of a surrogate pair, perhaps. Python decodes it, and then neither file, database nor answer can hold the text.
_MAYBE_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def loads(data: str | bytes) -> Any:
    """Decode ``data`` (UTF-8 when bytes). Raises ``json.JSONDecodeError`` for everything that is wrong with it."""
    text = ""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
        if _MAYBE_HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError:
        raise json.JSONDecodeError("not valid UTF-8", text, 0) from None
    except UnicodeEncodeError:
        raise json.JSONDecodeError("half of a surrogate pair", text, 0) from None
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None
    except ValueError as exc:  # raised by the hooks below, and for integers with thousands of digits
        raise json.JSONDecodeError(str(exc), text, 0) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
