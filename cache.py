"""What takes long to get is kept: a memory-mapped cache of decoded files, downloads, unpacked archives.

Nothing is ever there by half: each is made beside its place and renamed.
"""

import glob
import hashlib
import http.client
import os
import stat
import tempfile
import urllib.request
import zipfile
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

from utill import UserError, reason_of

CACHE_VERSION = 4  # raise it whenever decoding or the form of the file changes
MOST_MEMBERS = 200_000  # of an archive
BLOCK = 1 << 20  # bytes read at a time


# ---- Cache ---------------------------------------------------------------------------------------


def cached_array(root, name, facts, shape, job, pieces, describe, summary=None):
    """What `job` makes of all `pieces`: uint8 tensor of `shape` mapped from a cache file, and a list of floats.

    root: data folder; the cache lies in root/.bntt_cache, or the user's cache folder if root is read-only
    name: how the file's name begins; older caches of that name are removed
    facts: str, what the content depends on, such as `file_facts`; the file's name carries its hash
    job: job(piece) -> uint8 array [n, *shape[1:]], or (array, more), run by worker processes, so it must pickle
    pieces: list; their arrays in its order make up the whole
    describe: text of the progress bar
    summary: has update(array), or update(array, more), and values() -> floats, kept in the file; None: no floats
    Raises UserError if the cache cannot be written, and whatever `job` raises; then nothing is left behind.
    """
    key = hashlib.sha256(f"{CACHE_VERSION} {facts}".encode()).hexdigest()[:16]
    folder = cache_folder(Path(root))
    path = folder / f"{name}-{key}.npy"
    cache = read_cache(path, shape)
    if cache is None:
        write_cache(path, shape, job, pieces, describe, summary)
        for old in set(folder.glob(f"{glob.escape(name)}-{'?' * len(key)}.npy")) - {path}:
            old.unlink(missing_ok=True)
        cache = read_cache(path, shape)
    if cache is None:
        raise UserError(f"{path} was removed while it was in use: run this again")
    return cache


def file_facts(root, paths):
    """One line per file: its path below root, size in bytes, time of change in ns. OSError if one is not there."""
    found = [(os.path.relpath(path, root), os.stat(path)) for path in paths]
    return "\n".join(f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in found)


def cache_folder(root):
    """root/.bntt_cache, or one under the user's cache folder where root cannot be written to."""
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    for folder in (root / ".bntt_cache", user / "bntt" / name):
        with suppress(OSError, RuntimeError):
            folder = folder.expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    raise UserError(f"cannot write a cache to {root} nor to {user}: set XDG_CACHE_HOME to a writable folder")


def read_cache(path, shape):
    """(uint8 tensor, mapped and not read; list of the summary) in the file; None if it is not there and whole."""
    try:
        array = np.load(path, mmap_mode="c")  # copy on write: torch wants writable memory
        end = array.offset + array.nbytes
        count, *values = np.fromfile(path, "f8", offset=end).tolist()
        whole = os.path.getsize(path) == end + 8 * (1 + count)
    except (OSError, ValueError, EOFError, AttributeError):
        return None
    if not whole or array.dtype != np.uint8 or array.shape != tuple(shape):
        return None
    return torch.from_numpy(array), values


def write_cache(path, shape, job, pieces, describe, summary):
    """Run the jobs into the cache file: written aside, synced and renamed, so never half there.

    One file, that data and summary are whole together or not there at all: a .npy of the data, and
    behind it, as float64, how many values the summary has, and these.
    """
    workers = min(8, os.cpu_count() or 1, len(pieces))
    pool = ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) if workers > 1 else None
    try:
        with (
            tempfile.TemporaryDirectory(dir=path.parent, prefix="tmp-") as aside,
            tqdm(total=shape[0], desc=describe, unit="file", disable=None) as bar,
        ):
            with open(Path(aside) / path.name, "wb") as file:
                np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=tuple(shape)))
                for result in (pool.map if pool else map)(job, pieces):
                    array, *more = result if isinstance(result, tuple) else (result,)
                    file.write(np.ascontiguousarray(array).data)
                    if summary:
                        summary.update(array, *more)
                    bar.update(len(array))
                values = summary.values() if summary else []
                file.write(np.array([len(values), *values], "f8").data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(Path(aside) / path.name, path)
    except BrokenExecutor as error:
        raise UserError(f"{describe}: a process was killed, perhaps for want of memory") from error
    except OSError as error:
        raise UserError(f"cannot write the cache in {path.parent}: {error}") from error
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
        with suppress(OSError):  # succeeds only on an empty folder: nothing is left of a failed first run
            path.parent.rmdir()


# ---- Downloads and archives ------------------------------------------------------------------------


def download(url, path, size, md5):
    """Make sure that the published file is at `path`: one that is there is checked, else `url` is fetched.

    size: in bytes. Raises UserError if the file is not of that size and md5 sum, or cannot be fetched;
    then there is no file at `path` unless it was there before.
    """
    if path.exists():
        if os.path.getsize(path) != size or not check_integrity(path, md5):
            raise UserError(f"{path} is incomplete or damaged: remove it and fetch {url} again")
        return
    new, digest, got = not path.parent.exists(), hashlib.md5(), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as aside:
            with (
                urllib.request.urlopen(url, timeout=60) as answer,
                open(Path(aside) / path.name, "wb") as file,
                tqdm(total=size, desc=f"downloading {path.name}", unit="B", unit_scale=True, disable=None) as bar,
            ):
                while got <= size and (block := answer.read(BLOCK)):
                    file.write(block)
                    digest.update(block)
                    got += len(block)
                    bar.update(len(block))
            if got < size:
                raise OSError(f"it broke off after {got} of {size} bytes")
            if digest.hexdigest() != md5:
                raise OSError("what came is not the published file: its md5 sum differs")
            os.replace(Path(aside) / path.name, path)
    except (OSError, http.client.HTTPException) as error:
        if new:
            with suppress(OSError):
                path.parent.rmdir()
        raise UserError(
            f"cannot download {url} ({error}): try again, or fetch it on a machine with internet and put "
            f"{path.name} into {path.parent}"
        ) from error


def extract_zip(path, folder, most_bytes, top=""):
    """Unpack the whole archive at `path` into `folder`, a new one: aside first, so that it is never there by half.

    most_bytes: how large the unpacked files may be together
    top: the folder in the archive that becomes `folder`; "" for the archive's root
    Raises UserError if the archive is cut or damaged, is too large, holds more than MOST_MEMBERS members,
    a link or a path that leads out of the archive, or the disk is full.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            check_members(path, members, most_bytes)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpack-") as aside:
                inside = Path(aside) / "inside"
                for member in tqdm(members, desc=f"unpacking {path.name}", unit="file", disable=None):
                    archive.extract(member, inside)  # no more bytes than the member declares
                if not (inside / top).is_dir():
                    raise UserError(f"{path} has no folder {top} in it: fetch it again")
                os.replace(inside / top, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a whole zip archive ({error}): remove it and fetch it again") from error
    except OSError as error:
        raise UserError(f"cannot unpack {path} into {folder}: {reason_of(error)}") from error


def check_members(path, members, most_bytes):
    """UserError if an archive's members [ZipInfo] are too many or too large, or one would land outside."""
    if len(members) > MOST_MEMBERS or sum(member.file_size for member in members) > most_bytes:
        raise UserError(f"{path} is not what it should be: unpacked it would be too large, and is left alone")
    for member in members:
        name, kind = PureWindowsPath(member.filename), stat.S_IFMT(member.external_attr >> 16)  # takes / and \ alike
        if name.anchor or ".." in name.parts or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UserError(f"{path} is not safe to unpack: {member.filename!r} is a link or leads out of its folder")
