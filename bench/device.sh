#!/usr/bin/env bash
# Answers on a bare machine with an NVIDIA GPU, in five minutes: are the bits of mxlab's CUDA kernels those of the
# reference, how fast are they, and what do quantized models cost? Needs Python 3.11 or newer, and pip's network once.
#
#   bench/device.sh              writes bench/results/device-<gpu name>.json
#   OUT=folder bench/device.sh   writes it there
#
# A torch that is there is kept; otherwise pip installs one. Outside a virtual environment all else goes to .venv-device.
set -euo pipefail

readonly TOTAL=295 LEAST=120 # seconds: of everything, and at least of measuring
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
readonly root

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

find_python() {
    local name
    for name in python3 python python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v -- "$name"
            return
        fi
    done
    die "no Python 3.11 or newer on the PATH: install one, with its venv module (Debian: python3-venv)"
}

# Run Python without the folder it is called in on its path.
py() {
    "$python" -P "$@"
}

pip_install() {
    py -m pip install --quiet --disable-pip-version-check "$@" ||
        die "pip install $* failed: what it says above tells why; bench/device.sh goes on where this one stopped"
}

# Whether this checkout is installed, with what compiles its kernels.
is_set_up() {
    py -c 'import sys, mxlab, cuda.core; sys.exit(not mxlab.__file__.startswith(sys.argv[1]))' "$root/" 2>/dev/null
}

set_up() {
    py -c 'import torch' 2>/dev/null || pip_install torch
    local version major
    version="$(py -c 'import torch; print(torch.__version__)')"
    major="$(py -c 'import torch; print((torch.version.cuda or "").partition(".")[0])')"
    [[ "$major" == 12 || "$major" == 13 ]] ||
        die "torch $version is built for CUDA '${major:-none}': install one for CUDA 12 or 13, or remove it"
    py -c 'import torch; torch.zeros(1, device="cuda")' ||
        die "torch $version cannot use the GPU: what it says above tells why, often that it is newer than the driver"
    is_set_up && return
    # The kernels for the CPU are not needed here, and take a compiler and a minute.
    (cd -- "$root" && pip_install --constraint <(printf 'torch==%s\n' "$version") \
        --config-settings wheel.cmake=false --config-settings wheel.py-api=py3 --editable ".[cuda$major]")
}

command -v nvidia-smi >/dev/null || die "no nvidia-smi on the PATH: this needs an NVIDIA GPU and its driver"
python="$(find_python)"
if py -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)'; then
    [[ -x "$root/.venv-device/bin/python" ]] || py -m venv --system-site-packages "$root/.venv-device" ||
        die "$python cannot make a virtual environment (Debian: apt-get install python3-venv)"
    python="$root/.venv-device/bin/python"
fi
set_up
seconds=$((TOTAL - SECONDS))
if ((seconds < LEAST)); then
    printf 'set-up took %s s: measuring for %s s; run this again to measure for longer\n' "$SECONDS" "$LEAST"
    seconds=$LEAST
fi
exec "$python" "$root/bench/device.py" --out "${OUT:-$root/bench/results}" --seconds "$seconds"
