#!/usr/bin/env bash
# What `make demo` runs: quickstart.py with the python on PATH. LAYOUT is tp2, pp2 or dp2; further arguments are passed on.
set -euo pipefail
exec python "$(dirname "${BASH_SOURCE[0]}")/quickstart.py" --layout "${LAYOUT:-tp2}" "$@"
