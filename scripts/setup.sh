# Sourced by scripts/demo and scripts/test: makes .venv if there is none and installs medssl.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
find_python() {
  for name in python3.13 python3.12 python3.11 python3 python; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
    then echo "$name"; return; fi
  done
  echo "medssl needs Python 3.11 or newer; found: $(python3 --version 2>&1)" >&2
  exit 2
}
if [ ! -x .venv/bin/python ]; then
  "$(find_python)" -m venv .venv
fi
wanted="$(cat pyproject.toml) ${1:-}"
installed="$(cat .venv/.medssl_installed 2>/dev/null || true)"
if [ "$installed" != "$wanted" ] && [ "$installed" != "$wanted[dev]" ]; then
  echo "installing into .venv (about 3 GB to download the first time, mostly torch)"
  # what is imported is compiled then: all 19,000 files would take a minute
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
    --editable ".${1:-}"
  echo "$wanted" > .venv/.medssl_installed
fi
