#!/usr/bin/env bash
# Builds Horovod for PyTorch on CPU (Gloo) and installs it:  integrations/build_horovod.sh [PYTHON [PIP OPTION ...]]
#
# PYTHON is the interpreter to install it for (python3 by default), with torch, setuptools, wheel and packaging there.
# A C++17 compiler and make are needed; cmake is fetched. 4 minutes on two cores, once: the wheel is kept in
# ${XDG_CACHE_HOME:-~/.cache}/saef, by the versions of torch and Python.
#
# Horovod 0.28.1, its last release, does not build against a current torch as it is. Changed in its source:
#   - C++17 instead of 14, which torch's headers need, in two places: with only one of them linking fails;
#   - headers it forgets, <string>, <cstdint> and <stdexcept>, which GCC 13 and newer do not include by the way;
#   - with Gloo a vector was reserved where it had to be resized, so that no stall limit worked, and ranks that wait
#     for one another waited for ever;
#   - a rank that waited for a collective took and dropped Python's lock in a loop, so that with fewer cores than threads
#     little else ran: now it sleeps in between.
# HOROVOD_* variables that are set already win, for a build with more in it.
set -euo pipefail

version=0.28.1
here=$(dirname "${BASH_SOURCE[0]}")
python=$(command -v "${1:-python3}") || { echo "no such Python: $1" >&2; exit 1; }
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

"$python" -c 'import packaging, setuptools, torch, wheel' || {
    echo "Install torch, setuptools, wheel and packaging for $python first: Horovod is built against them." >&2
    exit 1
}
key=$("$python" -c 'import sys, torch; print(f"torch-{torch.__version__}-{sys.implementation.cache_tag}")')
recipe=$(cksum < "$here/build_horovod.sh" | cut -d ' ' -f 1)
wheels="${XDG_CACHE_HOME:-$HOME/.cache}/saef/horovod-$version-$key-$recipe"

if ! ls "$wheels"/horovod-*.whl > /dev/null 2>&1; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    echo "building Horovod $version for $key; it will be kept in $wheels"
    pip download -q --no-deps --no-build-isolation --no-binary horovod -d "$work" "horovod==$version"
    tar -xzf "$work/horovod-$version.tar.gz" -C "$work"
    source="$work/horovod-$version"
    sed -i 's/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD 17/' "$source/CMakeLists.txt" "$source/horovod/torch/CMakeLists.txt"
    sed -i 's/global_ranks_.reserve(size_)/global_ranks_.resize(size_)/' "$source/horovod/common/gloo/gloo_controller.cc"
    sed -i 's/std::this_thread::yield();/std::this_thread::sleep_for(std::chrono::microseconds(100));/' \
        "$source/horovod/torch/mpi_ops_v2.cc"
    pip install -q --target "$work/cmake" cmake==3.31.10

    export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
    export HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI="${HOROVOD_WITHOUT_MPI-1}"
    export HOROVOD_CPU_OPERATIONS="${HOROVOD_CPU_OPERATIONS-GLOO}"
    export CXXFLAGS="${CXXFLAGS-} -include string -include cstdint -include stdexcept"
    export CMAKE_POLICY_VERSION_MINIMUM=3.5 LDFLAGS="${LDFLAGS-} -s" MAKEFLAGS="${MAKEFLAGS:--j$(nproc)}"
    export PATH="$work/cmake/cmake/data/bin:$(dirname "$python"):$PATH"  # Horovod's own build calls `python`
    pip wheel --no-deps --no-build-isolation -w "$work/wheels" "$source" > "$work/log" 2>&1 || {
        grep -n -A 4 'error:' "$work/log" | head -n 60 >&2 || tail -n 60 "$work/log" >&2
        echo "Horovod could not be built; above is what the build printed about errors." >&2
        exit 1
    }
    mkdir -p "$wheels"
    mv "$work"/wheels/horovod-*.whl "$wheels/"
fi
pip install -q "${@:2}" "$wheels"/horovod-*.whl
pip install -q --no-deps --force-reinstall "$wheels"/horovod-*.whl  # another build has the same version
