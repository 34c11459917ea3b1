#!/usr/bin/env bash
# Make .venv, install the package into it and compile its library: `setup.sh run` to use it, `setup.sh test` with the
# test tools too. Does nothing, at once, when that has been done for these files and this place.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

want=${1:-run}
venv=.venv
stamp=$venv/.dovetail-complete
marker=$venv/.dovetail-installing
native_stamp=$venv/.dovetail-native
build=build/native

hash=$(cat pyproject.toml scripts/setup.sh scripts/torch_choice.py | sha256sum | cut -d ' ' -f 1)
native_hash=$({ printf '%s\n' "$hash"; find CMakeLists.txt csrc -type f -exec sha256sum {} +; } |
    LC_ALL=C sort | sha256sum | cut -d ' ' -f 1)

# The place counts because scripts in a virtual environment name it.
installed() {
    local place="" installed="" extras=""
    [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ ! -e "$marker" ] || return 1
    { read -r place; read -r installed; read -r extras; } <"$stamp" || return 1
    [ "$place" = "$PWD" ] && [ "$installed" = "$hash" ] && { [ "$extras" = test ] || [ "$want" = run ]; }
}

compiled() {
    [ -f "$native_stamp" ] && [ "$(cat "$native_stamp")" = "$native_hash" ] &&
        compgen -G 'dovetail/_native.*.so' >/dev/null
}

ready() { installed && compiled; }

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
        rm -rf "$build"
    fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        need "pip in the virtual environment" python3-pip
        exit 1
    fi
}

install_package() {
    make_venv
    say "asking pip which build of torch it would install"
    "$venv/bin/python" scripts/torch_choice.py "$want" 9<&- || {
        status=$?
        # Nothing has been installed yet when the choice is put to the user.
        [ "$status" -ne 3 ] || rm -f "$marker"
        exit "$status"
    }
    local target=. quiet=() pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input)
    [ "$want" = test ] && target='.[test]'
    say "installing dovetail and what it needs (a few minutes the first time)"
    [ -t 2 ] || quiet=(--quiet)
    # What the build needs stays in the environment: at another place each time, all would be compiled each time.
    # pip compiles nothing: `compile` puts the library next to the sources, from where it is loaded.
    "$venv/bin/python" -c 'import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' >"$venv/.dovetail-build"
    "${pip[@]}" --quiet --requirement "$venv/.dovetail-build" 9<&-
    "${pip[@]}" "${quiet[@]}" --no-build-isolation --config-settings editable.mode=inplace \
        --config-settings wheel.cmake=false --editable "$target" 9<&-
    printf '%s\n' "$PWD" "$hash" "$want" >"$stamp.new"
    mv "$stamp.new" "$stamp"
    rm -f "$marker"
}

# The cmake to use: the environment's, or the system's if that is new enough; nothing if there is none.
find_cmake() {
    local name version
    for name in "$venv/bin/cmake" cmake; do
        version=$("$name" --version 2>/dev/null | sed -n 's/^cmake version \([0-9.]*\).*/\1/p') || continue
        if [ -n "$version" ] && [ "$(printf '3.18\n%s\n' "$version" | sort -V | head -n 1)" = 3.18 ]; then
            printf '%s\n' "$name"
            return
        fi
    done
}

compile() {
    local cmake log=$build/log
    rm -f "$native_stamp"
    cmake=$(find_cmake)
    if [ -z "$cmake" ]; then
        say "fetching cmake"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input 'cmake>=3.18' 9<&-
        cmake=$venv/bin/cmake
    fi
    if [ -e "$build/CMakeCache.txt" ]; then
        say "compiling what has changed of the native library"
    else
        say "compiling the native library (about a minute)"
    fi
    configure "$cmake" || {
        # Made for another place, Python or compiler.
        rm -rf "$build"
        configure "$cmake" || failed "$(cat "$log")" "cmake cannot configure the native library"
    }
    # A make around this one is not this one's business.
    env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL \
        CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}" \
        "$cmake" --build "$build" >"$log" 2>&1 9<&- ||
        failed "$(grep -v '^\[ *[0-9]*%\] ' "$log")" "the native library does not compile"
    "$cmake" --install "$build" --prefix "$build/installed" >"$log" 2>&1 9<&- ||
        failed "$(cat "$log")" "the native library cannot be installed"
    # Moved, not written over: a running program keeps the one that it has loaded.
    mv -f "$build"/installed/dovetail/_native.*.so dovetail/
    printf '%s\n' "$native_hash" >"$native_stamp"
}

configure() { # CMAKE
    mkdir -p "$build"
    "$1" -S . -B "$build" -DPython_EXECUTABLE="$PWD/$venv/bin/python" >"$log" 2>&1 9<&-
}

failed() { # OUTPUT PROBLEM
    printf '%s\n' "$1" >&2
    say "$2; what it says is above"
    exit 1
}

ready && exit 0

# Two makes at once: the second waits, and then finds the work done.
exec 9<.
if command -v flock >/dev/null 2>&1; then
    flock -n 9 || { say "waiting for another setup to finish"; flock 9; }
fi
ready && exit 0

check_prerequisites
installed || install_package
compiled || compile
