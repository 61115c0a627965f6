#!/bin/sh
# Prints a Python >= 3.12, from $PYTHON, the PATH or pyenv's versions; 3.12 itself if there is one,
# because megatron-core's wheels are built for it.
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

pyenv=${PYENV_ROOT:-$HOME/.pyenv}/versions
for candidate in "$PYTHON" python3.12 "$pyenv"/3.12*/bin/python \
    python3 python python3.14 python3.13 "$pyenv"/3.1[3-9]*/bin/python; do
    [ -n "$candidate" ] || continue
    if new_enough "$candidate"; then
        command -v "$candidate"
        exit 0
    fi
done
echo "No Python >= 3.12 on the PATH or among pyenv's versions (megatron-core 0.19 needs it)." >&2
echo "Get one, for example with: pyenv install 3.12, or apt-get install python3.12-venv;" >&2
echo "then run make again, or name it: PYTHON=/path/to/python3.12 make setup" >&2
exit 1
