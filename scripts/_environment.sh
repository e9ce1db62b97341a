# Shell functions that scripts/quickstart and scripts/test share: Python, the environment .venv, ComfyUI's own.
# Sourced by bash; expects ROOT, the repository's folder. Installs nothing outside .venv.

VENV="$ROOT/.venv"
MARK="$VENV/.made-by-nava-nodes" # tells our environment from someone else's
STAMP="$VENV/.installed"         # a hash of all that the installed packages follow from
LOG="$VENV/install.log"
CONSTRAINTS="$VENV/constraints.txt"
TORCH=(torch==2.11.0 torchaudio==2.11.0 torchvision==0.26.0)
CPU_INDEX="${NAVA_CPU_INDEX:-https://download.pytorch.org/whl/cpu}"
NEEDED_GB=9
HOST_GB=2 # of one ComfyUI's requirements beside the others'
unset PYTHONHOME PYTHONPATH # of another environment

say() { printf '%s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}

# --- Python ---------------------------------------------------------------------------------------------------

# Whether $1 is a Python that serves: 3.10 to 3.13.
python_serves() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

# Prints the Python to make the environment with, or ends with what is missing.
find_python() {
    local candidate found=""
    if [ -n "${PYTHON:-}" ]; then
        python_serves "$PYTHON" || die "PYTHON=$PYTHON is not Python 3.10 to 3.13: set it to one that is."
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3.12 python3.11 python3.13 python3.10 python3 python; do
        if python_serves "$candidate"; then
            command -v "$candidate"
            return
        fi
        [ -n "$found" ] || found=$("$candidate" --version 2>/dev/null) || found=""
    done
    die "Python 3.10 to 3.13 is needed and there is ${found:-none} here: install one (on Debian and Ubuntu python3 and" \
        "python3-venv), or set PYTHON to its path."
}

# --- disk -----------------------------------------------------------------------------------------------------

# Ends unless $2 gigabytes are free where $1 is.
check_disk() {
    local free
    free=$(df -Pk "$1" 2>/dev/null | awk 'NR == 2 { print int($4 / 1024 / 1024) }')
    [ -z "$free" ] || [ "$free" -ge "$2" ] ||
        die "The disk of $1 has $free GB free, the environment needs $2 GB: make room, or clone to another disk."
}

# --- the environment ------------------------------------------------------------------------------------------

# Makes .venv where there is none that serves. Never touches one that it did not make.
make_environment() {
    local python
    if [ -e "$VENV" ] && [ ! -e "$MARK" ]; then
        die "$VENV is there but was not made by these scripts: move it away, then run this again."
    fi
    if [ -e "$MARK" ] && python_serves "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    python=$(find_python) || exit 1
    check_disk "$ROOT" "$NEEDED_GB"
    rm -rf "$VENV"
    mkdir -p "$VENV" 2>/dev/null || die "$ROOT cannot be written to: clone the repository to a folder of your own."
    : >"$MARK"
    say "Making an environment in $VENV with $("$python" --version)."
    if ! "$python" -m venv "$VENV" >"$LOG" 2>&1; then
        rm -rf "$VENV"
        die "$python cannot make environments, its venv module is not whole: install it (on Debian and Ubuntu" \
            "python3-venv), or set PYTHON to another one."
    fi
}

# A hash of its arguments, the Python in .venv and the files that say what is installed.
environment_hash() {
    { printf '%s\n' "$@" "${TORCH[@]}"
      "$VENV/bin/python" --version
      cat "$ROOT/pyproject.toml" "$ROOT/requirements.txt"
      if has_nvidia; then echo "NVIDIA GPU"; fi
    } 2>&1 | cksum
}

# pip in .venv, quiet; what it says is in $LOG.
pip_install() { pip_install_with "$VENV/bin/python" "$@"; }

# The same for the Python $1.
pip_install_with() {
    mkdir -p "$VENV/tmp"
    # Wheels of gigabytes are unpacked beside the environment: /tmp is in memory on some machines.
    TMPDIR="$VENV/tmp" PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$1" -m pip install --no-input "${@:2}" >>"$LOG" 2>&1
}

# Ends with why the last pip_install failed, as far as its log tells.
explain_pip() {
    local last
    if grep -q "No space left on device" "$LOG"; then
        die "The disk became full while $1 was installed: make room, then run this again. ($LOG)"
    elif grep -qE "NewConnectionError|ConnectTimeout|ReadTimeout|NameResolution|Temporary failure|Name or service|ProxyError|Connection refused|SSLError|Network is unreachable" "$LOG"; then
        die "The network did not let pip fetch $1: check the connection (and proxy), then run this again. ($LOG)"
    fi
    last=$(grep -E "^ERROR" "$LOG" | tail -n 1)
    die "Installing $1 failed: ${last:-see $LOG} ($LOG)"
}

has_nvidia() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# torch with torchaudio and torchvision: the CPU build without an NVIDIA GPU where its index answers, else PyPI's.
install_torch() {
    if has_nvidia; then
        say "Installing torch for the NVIDIA GPU (some minutes at first)."
        # A CPU build from before there was a GPU would be taken for the one that is wanted.
        if "$VENV/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' >/dev/null 2>&1; then
            "$VENV/bin/python" -m pip uninstall --yes torch torchaudio torchvision >>"$LOG" 2>&1
        fi
    else
        say "Installing torch for the CPU (some minutes at first)."
        if [ "$(uname -m)" = x86_64 ] &&
            pip_install --retries 0 --timeout 15 --index-url "$CPU_INDEX" "${TORCH[@]}"; then
            return
        fi
        : >"$LOG" # so that only the next failure is explained
    fi
    pip_install "${TORCH[@]}" || explain_pip torch
    if has_nvidia && ! "$VENV/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1; then
        say "torch cannot use the NVIDIA GPU, most likely because its driver is older than torch's CUDA" \
            "$("$VENV/bin/python" -c 'import torch; print(torch.version.cuda)'): update the driver; until then the CPU is used."
    fi
}

# install_all NAME EXTRAS: torch and the pack with its extras. Quick where all is there already.
install_all() {
    local wanted
    wanted=$(environment_hash "$2")
    if [ -e "$STAMP.$1" ] && [ "$(cat "$STAMP.$1")" = "$wanted" ]; then
        return
    fi
    rm -f "$STAMP.$1"
    compgen -G "$VENV/lib/python*/site-packages/torch" >/dev/null ||
        check_disk "$ROOT" "$NEEDED_GB"
    : >"$LOG"
    install_torch
    keep_torch
    say "Installing the pack's own requirements."
    pip_install -c "$CONSTRAINTS" -r "$ROOT/requirements.txt" -e "$ROOT[$2]" || explain_pip "the pack's requirements"
    rm -rf "$VENV/tmp"
    printf '%s\n' "$wanted" >"$STAMP.$1"
}

# Notes the installed torch, so that nothing installed after it can change it.
keep_torch() {
    "$VENV/bin/python" -m pip freeze --disable-pip-version-check | grep -E '^torch(audio|vision)?==' >"$CONSTRAINTS"
}

# --- ComfyUI --------------------------------------------------------------------------------------------------

# Prints the folder of every ComfyUI, one a line: COMFYUI_PATH (and then no other place), the folder above the
# custom_nodes this checkout is in, ~/comfy/ComfyUI and ~/comfy/ComfyUI-*.
find_comfyuis() {
    local place folder seen=$'\n'
    if [ -n "${COMFYUI_PATH:-}" ]; then
        set -- "$COMFYUI_PATH"
    else
        set -- "${HOME:-/nonexistent}"/comfy/ComfyUI "${HOME:-/nonexistent}"/comfy/ComfyUI-*
        if [ "$(basename "$(dirname "$ROOT")")" = custom_nodes ]; then
            set -- "$(dirname "$(dirname "$ROOT")")" "$@"
        fi
    fi
    for place in "$@"; do
        [ -f "$place/comfy/sd.py" ] && [ -f "$place/main.py" ] && folder=$(cd "$place" && pwd -P) || continue
        case "$seen" in *$'\n'"$folder"$'\n'*) continue ;; esac
        seen+="$folder"$'\n'
        printf '%s\n' "$folder"
    done
}

# The version of the ComfyUI in $1, as it calls itself.
comfyui_version() {
    sed -n 's/^__version__ *= *"\(.*\)".*/\1/p' "$1/comfyui_version.py" 2>/dev/null
}

# install_comfyui FOLDER: an environment of its own for that ComfyUI's requirements, over .venv: what is there and
# serves is not installed again. Prints its Python. Quick where all is there already.
install_comfyui() {
    local home stamp wanted filtered
    home="$VENV/hosts/$(basename "$1")"
    stamp="$home/.installed" filtered="$home/requirements.txt"
    wanted=$(environment_hash "$1" "$(cat "$1/requirements.txt")")
    if [ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        rm -f "$stamp"
        check_disk "$ROOT" "$HOST_GB"
        : >"$LOG"
        say "Installing the requirements of ComfyUI $(comfyui_version "$1") at $1."
        "$VENV/bin/python" -m venv --clear --without-pip "$home" >>"$LOG" 2>&1 || die "$home cannot be made. ($LOG)"
        see_packages "$home"
        keep_torch
        grep -vE '^[[:space:]]*torch(audio|vision)?([^a-z]|$)' "$1/requirements.txt" >"$filtered"
        pip_install_with "$home/bin/python" -c "$CONSTRAINTS" -r "$filtered" || explain_pip "ComfyUI's requirements"
        rm -rf "$VENV/tmp"
        printf '%s\n' "$wanted" >"$stamp"
    fi
    printf '%s\n' "$home/bin/python"
}

# Lets the environment $1 see what .venv has, behind its own packages.
see_packages() {
    local packages
    packages=$(compgen -G "$VENV/lib/python*/site-packages")
    printf 'import site; site.addsitedir(r"%s")\n' "$packages" >"$(compgen -G "$1/lib/python*/site-packages")/nava_nodes.pth"
}
