"""Exchange the NCCL of a vLLM environment, and see which one is really loaded. Run by runtime/Dockerfile.

Usage: ``python3 nccl_version.py install VERSION | check VERSION | show``, by the interpreter that has vLLM. Standard
library only, Linux. Needs no GPU: NCCL tells its version without one.

Promise: ``check`` believes the loaded library only. What PyTorch says of itself (``torch.cuda.nccl.version()``) is the
version it was compiled with, and a package's metadata is what somebody meant to install.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGE = re.compile(r"nvidia-nccl-cu\d+")
USAGE = 2


class NcclError(Exception):
    """One sentence for whoever builds the image."""


def package() -> str:
    """Name of the installed package that holds NCCL. Raises ``NcclError``."""
    names = {str(found.metadata["Name"]).lower().replace("_", "-") for found in metadata.distributions()}
    known = sorted(name for name in names if PACKAGE.fullmatch(name))
    if len(known) != 1:
        raise NcclError(f"expected one package nvidia-nccl-cuXX beside {sys.executable}, found: {known or 'none'}")
    return known[0]


def install(version: str) -> None:
    """Put this version in the place of the installed one. Its dependants are not asked: ``check`` tells. Blocks."""
    if not re.fullmatch(r"\d+(\.\d+){1,3}", version):
        raise NcclError(f"NCCL_VERSION must be a version such as 2.21.5, not {version!r}")
    wanted = f"{package()}=={version}"
    options = ["--no-deps", "--break-system-packages", wanted]
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "install", "--no-cache-dir", "--root-user-action=ignore", *options]
    else:  # some images have uv only
        command = ["uv", "pip", "install", "--no-cache", "--python", sys.executable, *options]
    if subprocess.run(command, check=False).returncode != 0:
        raise NcclError(f"{wanted} could not be installed: is there such a version for this CUDA?")


def loaded() -> tuple[str, Path]:
    """Version and file of the NCCL that PyTorch, and vLLM after it, get. Raises ``NcclError``."""
    try:
        importlib.import_module("torch")
    except ImportError as exc:
        raise NcclError(f"PyTorch cannot be loaded with this NCCL, it was built for a newer one: {exc}") from exc
    by_name = version_of(ctypes.CDLL("libnccl.so.2"))  # what vLLM asks for
    files = sorted({Path(line.split()[-1]) for line in _maps() if "/libnccl.so" in line})
    if len(files) != 1:
        raise NcclError(f"expected one NCCL in the process, found: {[str(file) for file in files] or 'none'}")
    return by_name, files[0]


def version_of(library: ctypes.CDLL) -> str:
    """Raises ``NcclError``."""
    number = ctypes.c_int()
    if library.ncclGetVersion(ctypes.byref(number)) != 0:
        raise NcclError("NCCL does not tell its version")
    major, rest = divmod(number.value, 10_000 if number.value >= 10_000 else 1_000)  # NCCL 2.9 changed it
    return f"{major}.{rest // 100}.{rest % 100}"


def _maps() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()


def main(arguments: list[str]) -> int:
    """Exit code: 0 done, 1 not so, 2 usage."""
    match arguments:
        case ["install", version]:
            install(version)
        case ["check", version]:
            found, file = loaded()
            if found != version:
                raise NcclError(f"NCCL {found} is loaded from {file}, not {version}")
            print(f"NCCL {found} is loaded from {file}")
        case ["show"]:
            print("NCCL {} from {}".format(*loaded()))
        case _:
            print(__doc__, file=sys.stderr)
            return USAGE
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except NcclError as exc:
        sys.exit(f"nccl_version: {exc}")
