"""What takes long to get is kept: a memory-mapped cache of decoded files, downloads, unpacked archives.

Nothing is ever there by half: each is made beside its place and renamed.
"""

import glob
import hashlib
import os
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utill import UserError, reason_of

CACHE_VERSION = 4  # raise it whenever decoding or the form of the file changes


@contextmanager
def aside(path, instead):
    """A context with a new folder. What is called path.name in it takes the place of `path` when the block is done.

    If anything fails, nothing is left behind: UserError with the reason, and what to do `instead`.
    """
    new = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="tmp-") as folder:
            yield Path(folder)
            os.replace(Path(folder) / path.name, path)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of the disk, the network, or an archive, which may raise anything
        raise UserError(f"cannot make {path} ({reason_of(error)}): {instead}") from error
    finally:
        for folder in new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


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

    One file, so that data and summary are whole together or not there at all: a .npy of the data, and
    behind it, as float64, how many values the summary has, and these.
    """
    workers = min(8, os.cpu_count() or 1, len(pieces))
    pool = ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) if workers > 1 else None
    try:
        with (
            aside(path, "it takes memory and room on the disk; XDG_CACHE_HOME may name another folder") as folder,
            tqdm(total=shape[0], desc=describe, unit="file", disable=None) as bar,
            open(folder / path.name, "wb") as file,
        ):
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
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
        with suppress(OSError):  # it is not empty
            path.parent.rmdir()


# ---- Downloads and archives ------------------------------------------------------------------------


def download(url, path, md5):
    """Make sure that the published file is at `path`: one that is there is checked, else `url` is fetched.

    Raises UserError if the file does not have that md5 sum, or cannot be fetched; then there is no file at `path`
    unless it was there before.
    """
    from torchvision.datasets.utils import check_integrity, download_url

    if not path.exists():
        instead = f"try again, or fetch {url} on a machine with internet and put {path.name} into {path.parent}"
        with aside(path, instead) as folder:
            download_url(url, folder, path.name, md5)
    elif not check_integrity(path, md5):
        raise UserError(f"{path} is incomplete or damaged: remove it and fetch {url} again")


def extract_zip(path, folder, most_bytes):
    """Unpack the archive at `path`, so that the folder of the name of `folder` in it becomes `folder`, a new one.

    most_bytes: how large the unpacked files may be together. Raises UserError if the archive is damaged, too large
    or has no such folder, or the disk is full. Whatever its members are called, they stay inside: zipfile sees to it.
    """
    with aside(folder, f"fetch {path} again; it must hold {folder.name}/") as inside, zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > most_bytes:  # a small zip may hold terabytes of zeros
            raise ValueError(f"it would unpack to more than {most_bytes:,} bytes")
        for member in tqdm(members, desc=f"unpacking {path.name}", unit="file", disable=None):
            archive.extract(member, inside)  # no more bytes than the member declares
