#!/usr/bin/env bash
# Make .venv, install the package into it and compile its library: `setup.sh run` to use it, `setup.sh test` with torch
# and the test tools too. `setup.sh compile` does nothing but compile. Does nothing, at once, when that has been done for
# these files and this place.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

want=${1:-run}
venv=.venv
stamp=$venv/.dovetail-complete
marker=$venv/.dovetail-installing
build=build/native
tools=build/tools # an environment of its own for what compiles: programs that run need none of it
sources=dovetail/_native.sources # the hash of what the library beside it was compiled from

hash=$(cat pyproject.toml scripts/setup.sh | sha256sum | cut -d ' ' -f 1)
native_hash=$(find CMakeLists.txt csrc -type f -exec sha256sum {} + | LC_ALL=C sort | sha256sum | cut -d ' ' -f 1)

# The place counts because scripts in a virtual environment name it.
installed() {
    local place="" installed="" extras=""
    [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ ! -e "$marker" ] || return 1
    { read -r place; read -r installed; read -r extras; } <"$stamp" || return 1
    [ "$place" = "$PWD" ] && [ "$installed" = "$hash" ] && { [ "$extras" = test ] || [ "$want" = run ]; }
}

compiled() {
    [ -f "$sources" ] && [ "$(cat "$sources")" = "$native_hash" ] && compgen -G 'dovetail/_native.*.so' >/dev/null
}

# Whether the library that is there is for this Python and this machine.
loads() { "$1" -c 'import dovetail._native' 2>/dev/null; }

ready() { { [ "$want" = compile ] || installed; } && compiled; }

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

require_python() {
    python=$(find_python)
    if [ -z "$python" ]; then
        need "Python 3.11 or newer${PYTHON:+ (PYTHON=$PYTHON is none)}" python3
    else
        "$python" -c 'import venv, ensurepip' 2>/dev/null || need "$python's venv and ensurepip" python3-venv
    fi
    stop_if_missing
}

require_compiler() {
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        need "$python's header Python.h" python3-dev
    command -v g++ >/dev/null 2>&1 || need "a C++ compiler" g++
    command -v make >/dev/null 2>&1 || need "make" make
}

stop_if_missing() {
    [ ${#missing[@]} -eq 0 ] || {
        say "on Debian or Ubuntu: apt-get install ${missing[*]}"
        exit 1
    }
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
        loads "$venv/bin/python" || rm -f "$sources"
    fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        need "pip in the virtual environment" python3-pip
        stop_if_missing
    fi
}

# What pyproject.toml says under `key`, one a line.
wants() { # PYTHON KEY...
    "$1" -c 'import sys, tomllib
found = tomllib.load(open("pyproject.toml", "rb"))
for key in sys.argv[1:]: found = found[key]
print(*found, sep="\n")' "${@:2}"
}

install_package() {
    make_venv
    local target=. quiet=() pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input)
    [ -t 2 ] || quiet=(--quiet)
    if [ "$want" = test ]; then
        target='.[test]'
        install_torch
    fi
    say "installing dovetail and what it needs"
    # pip compiles nothing: the library is put next to the sources, from where it is loaded.
    "${pip[@]}" "${quiet[@]}" --config-settings editable.mode=inplace --config-settings wheel.cmake=false \
        --config-settings wheel.py-api= --editable "$target" 9<&-
    printf '%s\n' "$PWD" "$hash" "$want" >"$stamp.new"
    mv "$stamp.new" "$stamp"
    rm -f "$marker"
}

install_torch() {
    "$venv/bin/python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' || {
        say "tests need torch: 0.2 GB as a CPU build, 3 GB and more if pip finds one for CUDA;" \
            "TORCH_INDEX_URL=URL takes it from another wheel index"
        wants "$venv/bin/python" project optional-dependencies torch >"$venv/.torch"
        "${pip[@]}" "${quiet[@]}" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} --requirement "$venv/.torch" 9<&-
    }
}

# The library out of a wheel of these sources in dist/, if there is one for this Python and machine.
unpack() {
    local wheel
    for wheel in dist/dovetail_llm-*.whl; do
        [ -f "$wheel" ] || continue
        "$venv/bin/python" - "$wheel" "$sources" "$native_hash" <<'PYTHON' || continue # it says why
import importlib.machinery, pathlib, platform, sys, zipfile

path, sources, wanted = sys.argv[1:]
wheel = zipfile.ZipFile(path)
names = [n for n in wheel.namelist() if n.startswith("dovetail/_native.") and n.endswith(".so")]
fitting = [n for n in names if n.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES[:-1]))]
if not fitting or platform.machine() not in path or sources not in wheel.namelist():
    sys.exit(f"setup: {path} has no library for this Python and machine")
if wheel.read(sources).decode().strip() != wanted:
    sys.exit(f"setup: the library in {path} was compiled from other sources")
new = pathlib.Path(fitting[0] + ".new")
new.write_bytes(wheel.read(fitting[0]))
before = pathlib.Path("build/before")
before.mkdir(parents=True, exist_ok=True)
for old in pathlib.Path("dovetail").glob("_native.*.so"):
    old.replace(before / old.name)  # Python would prefer one for its own version to one for all
new.rename(fitting[0])
PYTHON
        if ! loads "$venv/bin/python"; then
            rm -f dovetail/_native.*.so
            mv -f build/before/_native.*.so dovetail/ 2>/dev/null || true
            continue
        fi
        say "taking the native library from $wheel"
        printf '%s\n' "$native_hash" >"$sources"
        return
    done
    return 1
}

# The cmake to use: the one in `tools`, or the system's if that is new enough; nothing if there is none. Under Python 3.12
# and later the library is for all of these, which cmake can ask for since 3.26.
find_cmake() {
    local name version least=3.18
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' && least=3.26
    for name in "$tools/bin/cmake" cmake; do
        version=$("$name" --version 2>/dev/null | sed -n 's/^cmake version \([0-9.]*\).*/\1/p') || continue
        if [ -n "$version" ] && [ "$(printf '%s\n' $least "$version" | sort -V | head -n 1)" = $least ]; then
            printf '%s\n' "$name"
            return
        fi
    done
}

make_tools() {
    local complete=$tools/.dovetail-complete wanted pip=("$tools/bin/python" -m pip install --disable-pip-version-check --no-input)
    wanted=$(printf '%s\n' "$PWD" "$("$python" -V)"; wants "$python" build-system requires)
    [ -f "$complete" ] && [ "$(cat "$complete")" = "$wanted" ] && return
    say "fetching what compiles"
    rm -rf "$tools"
    mkdir -p build
    "$python" -m venv "$tools"
    wants "$python" build-system requires >"$tools/.requires"
    "${pip[@]}" --quiet --requirement "$tools/.requires" 9<&-
    [ -n "$(find_cmake)" ] || "${pip[@]}" --quiet 'cmake>=3.26' 9<&-
    printf '%s\n' "$wanted" >"$complete"
}

compile() {
    local cmake log=$build/log
    rm -f "$sources"
    make_tools
    cmake=$(find_cmake)
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
    # Moved, not written over: a running program keeps the one that it has loaded. Python would prefer one for its own
    # version to one for all, so no other may stay.
    mkdir -p "$build/before"
    mv -f dovetail/_native.*.so "$build/before/" 2>/dev/null || true
    mv -f "$build"/installed/dovetail/_native.*.so dovetail/
    printf '%s\n' "$native_hash" >"$sources"
}

configure() { # CMAKE
    mkdir -p "$build"
    "$1" -S . -B "$build" -DPython_EXECUTABLE="$PWD/$tools/bin/python" >"$log" 2>&1 9<&-
}

failed() { # OUTPUT PROBLEM
    printf '%s\n' "$1" >&2
    say "$2; what it says is above"
    exit 1
}

# The library: out of a wheel of these sources, or compiled, or, without a compiler, as it was compiled from other sources.
provide() {
    if [ "$want" != compile ]; then
        python=$venv/bin/python
        if unpack; then return; fi
    fi
    require_compiler
    if [ ${#missing[@]} -gt 0 ] && [ "$want" != compile ] && loads "$python"; then
        say "the native library stays the one that was compiled from other sources"
        return
    fi
    stop_if_missing
    compile
}

ready && exit 0

# Two makes at once: the second waits, and then finds the work done.
exec 9<.
if command -v flock >/dev/null 2>&1; then
    flock -n 9 || { say "waiting for another setup to finish"; flock 9; }
fi
ready && exit 0

if [ "$want" = compile ] && [ -x "$venv/bin/python" ]; then python=$venv/bin/python; else require_python; fi
[ "$want" = compile ] || installed || install_package
compiled || provide
