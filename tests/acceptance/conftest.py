"""What a module forgets to close is reported at its end: otherwise whichever test runs when Python comes round to
collecting it fails for it, many modules later."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()
