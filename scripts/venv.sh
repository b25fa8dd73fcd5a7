# Sourced by the other scripts: make .venv if there is none, install the requirements, activate it.
# VENV=DIR takes another virtual environment.
# shellcheck shell=bash
venv=${VENV:-.venv}
if [ ! -f "$venv/bin/activate" ]; then # it comes last
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed" >&2; exit 2; }
    python3 -m venv "$venv" || { echo "error: cannot make $venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
fi
. "$venv/bin/activate"
pip install --quiet --disable-pip-version-check -r requirements.txt "$@"
