#!/usr/bin/env bash
# Make .venv and install the package into it: `setup.sh run` to use it, `setup.sh test` with the test tools too.
# Does nothing, at once, when that has been done for this pyproject.toml, these scripts and this place.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

want=${1:-run}
venv=.venv
stamp=$venv/.dovetail-complete
marker=$venv/.dovetail-installing

hash=$(cat pyproject.toml scripts/setup.sh scripts/torch_choice.py | sha256sum | cut -d ' ' -f 1)

# The place counts because scripts in a virtual environment name it.
ready() {
    local place="" installed="" extras=""
    [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ ! -e "$marker" ] || return 1
    { read -r place; read -r installed; read -r extras; } <"$stamp" || return 1
    [ "$place" = "$PWD" ] && [ "$installed" = "$hash" ] && { [ "$extras" = test ] || [ "$want" = run ]; }
}

say() { printf 'setup: %s\n' "$*" >&2; }

missing=()
need() { # PROBLEM DEBIAN-PACKAGE
    say "missing: $1 (Debian package $2)"
    missing+=("$2")
}

find_python() {
    local name
    for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if command -v "$name" >/dev/null 2>&1 &&
            "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$name"
            return
        fi
    done
}

check_prerequisites() {
    python=$(find_python)
    if [ -z "$python" ]; then
        need "Python 3.11 or newer${PYTHON:+ (PYTHON=$PYTHON is none)}" python3
    else
        "$python" -c 'import venv, ensurepip' 2>/dev/null || need "$python's venv and ensurepip" python3-venv
        "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
            need "$python's header Python.h" python3-dev
    fi
    command -v g++ >/dev/null 2>&1 || need "a C++ compiler" g++
    command -v make >/dev/null 2>&1 || need "make" make
    if [ ${#missing[@]} -gt 0 ]; then
        say "on Debian or Ubuntu: apt-get install ${missing[*]}"
        exit 1
    fi
}

make_venv() {
    if [ -e "$marker" ]; then
        say "the last installation did not finish; starting afresh"
        rm -rf "$venv"
    elif [ -f "$stamp" ] && { [ "$(head -n 1 "$stamp")" != "$PWD" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
        say "the virtual environment was made elsewhere or for another Python; starting afresh"
        rm -rf "$venv"
    fi
    # First the marker: whatever dies from here on is seen as half done.
    mkdir -p "$venv"
    : >"$marker"
    rm -f "$stamp"
    if [ ! -x "$venv/bin/python" ]; then
        say "making a virtual environment in $venv with $("$python" --version)"
        "$python" -m venv "$venv"
    fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        need "pip in the virtual environment" python3-pip
        exit 1
    fi
}

ready && exit 0

# Two makes at once: the second waits, and then finds the work done.
exec 9<.
if command -v flock >/dev/null 2>&1; then
    flock -n 9 || { say "waiting for another setup to finish"; flock 9; }
fi
ready && exit 0

check_prerequisites
make_venv
say "asking pip which build of torch it would install"
"$venv/bin/python" scripts/torch_choice.py "$want" 9<&- || {
    status=$?
    # Nothing has been installed yet when the choice is put to the user.
    [ "$status" -ne 3 ] || rm -f "$marker"
    exit "$status"
}
target=.
[ "$want" = test ] && target='.[test]'
say "installing dovetail and what it needs (a few minutes the first time)"
quiet=()
[ -t 2 ] || quiet=(--quiet)
"$venv/bin/python" -m pip install "${quiet[@]}" --disable-pip-version-check --no-input \
    --config-settings editable_mode=compat --editable "$target" 9<&-
printf '%s\n' "$PWD" "$hash" "$want" >"$stamp.new"
mv "$stamp.new" "$stamp"
rm -f "$marker"
say "done"
