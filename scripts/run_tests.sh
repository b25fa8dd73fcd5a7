#!/usr/bin/env bash
# Install the requirements and the test tools into .venv, then lint and run every test, also those marked slow, which
# `pytest` alone leaves out. What tries to break it for longer is tests/stress/run.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh -r requirements-dev.txt
ruff check .
ruff format --check .
python -m pytest -m "" "$@"
