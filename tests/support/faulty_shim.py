"""A shim with a fault of its own: it breaks on the first request to stop. Run by path, like the real one."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

SHIM = Path(__file__).resolve().parents[2] / "vllm_bootstrap" / "launches" / "shim"


def broken(*_: object) -> None:
    raise RuntimeError("injected")


if __name__ == "__main__":
    package = ModuleType("vbs_shim")
    package.__path__ = [str(SHIM)]
    sys.modules["vbs_shim"] = package
    run = import_module("vbs_shim.run")
    run.Shim._ask_to_stop = broken
    sys.exit(run.main(sys.argv[1:]))
