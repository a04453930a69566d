#!/bin/sh
# Makes a virtual environment with pip, using a Python that is new enough.
# Usage: make_venv.sh DIRECTORY [PYTHON]
# An environment that is already there and works is kept. Works with a Python that has pip but not the module venv, as
# some base images have (what venv makes is a link, a folder and a file), and without Debian's python3-venv.
set -eu
target=$1
wanted=${2:-}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    for candidate in ${wanted:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.11 or newer found${wanted:+ at $wanted}. Install one, or name it: make PYTHON=/path/to/python3 ..." >&2
    exit 1
}

if new_enough "$target/bin/python" && "$target/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi
python=$(find_python)
if new_enough "$target/bin/python"; then
    clear=
else
    clear=--clear
fi
# What `venv --without-pip` does. $1: the interpreter, $2: the folder.
make_by_hand() {
    "$1" - "$2" <<'END'
import os, shutil, sys
folder = sys.argv[1]
base = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
packages = os.path.join(folder, "lib", "python%d.%d" % sys.version_info[:2], "site-packages")
shutil.rmtree(folder, ignore_errors=True)
os.makedirs(os.path.join(folder, "bin"))
os.makedirs(packages)
os.symlink(base, os.path.join(folder, "bin", "python"))
os.symlink("python", os.path.join(folder, "bin", "python3"))
with open(os.path.join(folder, "pyvenv.cfg"), "w") as file:
    file.write("home = %s\ninclude-system-site-packages = false\n" % os.path.dirname(base))
END
}

# shellcheck disable=SC2086  # $clear is one word or none
if ! "$python" -m venv $clear "$target" >/dev/null 2>&1; then
    "$python" -m venv --without-pip $clear "$target" 2>/dev/null || make_by_hand "$python" "$target"
    "$python" -m pip --python "$target/bin/python" install -q pip
fi
