#!/usr/bin/env bash
# The long stress: 2,200 wild and damaged inputs, then 50 kills of training runs, at least 10 of them inside a checkpoint
# write. Every part runs, whatever the one before found. Exit code 1 if any of them found something.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/venv.sh -r requirements-dev.txt
failed=0
python tests/stress/fuzz.py --count 2200 || failed=1
python tests/stress/kill_test.py --kills 50 --in_write 10 || failed=1
exit $failed
