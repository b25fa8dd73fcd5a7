"""Run the commands of a script one after the other in this one process, which imports and compiles once (see rows.sh).

Reads them from stdin, each word and before them their number ended by a zero byte: "3", "train.py", "--seed", "1".
Writes the exit code of each, a line, to the file descriptor 3.
"""

import gc
import importlib
import os
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repo root

import torch


def words(stream):
    """Generate the words of a stream that are ended by zero bytes."""
    word = bytearray()
    while byte := stream.read(1):
        if byte == b"\0":
            yield word.decode()
            word.clear()
        else:
            word += byte


def run(argv):
    """The exit code of a command, `train.py` and its flags."""
    sys.argv = argv
    try:
        return importlib.import_module(Path(argv[0]).stem).main(argv[1:]) or 0
    except SystemExit as error:  # --help
        return error.code or 0
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main():
    with os.fdopen(os.dup(0), "rb", buffering=0) as stream, suppress(BrokenPipeError):  # the script was stopped
        found = words(stream)
        for count in found:
            code = run([next(found) for _ in range(int(count))])
            sys.stdout.flush()
            os.write(3, f"{code}\n".encode())


if __name__ == "__main__":
    main()
