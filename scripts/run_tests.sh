#!/usr/bin/env bash
# Install the requirements and the test tools into .venv, then lint and run every test.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh -r requirements-dev.txt
ruff check .
ruff format --check .
python -m pytest "$@"
