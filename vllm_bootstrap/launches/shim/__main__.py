"""Entry point of the shim, run by path with ``-I -S``.

The modules beside this file use relative imports, so a package is made for them by hand: isolated mode has no path to
the installed one, and putting this folder's parent on ``sys.path`` would shadow standard modules (``types``).
"""

import os
import sys
from importlib import import_module
from types import ModuleType

if __name__ == "__main__":
    package = ModuleType("vbs_shim")
    package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
    sys.modules["vbs_shim"] = package
    sys.exit(import_module("vbs_shim.run").main(sys.argv[1:]))
