#!/bin/sh
# Makes a virtual environment with pip, using a Python that is new enough.
# Usage: make_venv.sh DIRECTORY [PYTHON]
# An environment that is already there and works is kept. Works without Debian's python3-venv too (through pip --python).
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
if ! "$python" -m venv $clear "$target" >/dev/null 2>&1; then
    "$python" -m venv --without-pip $clear "$target"
    "$python" -m pip --python "$target/bin/python" install -q pip
fi
