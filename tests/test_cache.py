"""cache.py: one claim per test. Downloads come from a server of this process."""

import errno
import hashlib
import os
import stat
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

import cache
from utill import UserError


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- Cache ---------------------------------------------------------------------------------------


class Total:
    """A summary: the sum of all values, and how often it was asked to update."""

    total = times = 0

    def update(self, array):
        self.total, self.times = self.total + int(array.sum(dtype=np.int64)), self.times + 1

    def values(self):
        return [self.total, self.times]


def ramp(piece):
    """uint8 [n, 2] of a piece (first value, n)."""
    first, n = piece
    return np.arange(first, first + 2 * n, dtype=np.uint8).reshape(n, 2)


def broken(piece):
    raise UserError("sample 7 cannot be read")


def killed(piece):
    os._exit(9)


PIECES = [(0, 3), (6, 1), (8, 2)]
WHOLE = np.arange(12).reshape(6, 2)


def cached(root, job=ramp, pieces=PIECES, facts="facts", name="events", summary=None):
    return cache.cached_array(root, name, facts, (6, 2), job, pieces, "reading", summary)


def only_cache(root):
    (path,) = (root / ".bntt_cache").iterdir()
    return path


@pytest.mark.parametrize("pieces", [PIECES, [(0, 6)]], ids=["processes", "alone"])
def test_the_cache_holds_what_the_jobs_make_in_order(tmp_path, pieces):
    array, values = cached(tmp_path, pieces=pieces)
    assert np.array_equal(array, WHOLE)
    assert values == []


def test_the_summary_is_kept_with_the_data(tmp_path):
    assert cached(tmp_path, summary=Total())[1] == cached(tmp_path, job=None, summary=Total())[1] == [66, 3]


class Mores:
    """A summary of what jobs return besides the array."""

    total = 0

    def update(self, array, more):
        self.total += more

    def values(self):
        return [float(self.total)]


def with_more(piece):
    return ramp(piece), 10


def test_what_a_job_returns_besides_the_array_goes_to_the_summary(tmp_path):
    first, second = (cached(tmp_path, with_more, summary=Mores()) for _ in range(2))
    assert first[1] == second[1] == [10.0 * len(PIECES)]
    assert first[0].equal(cached(tmp_path, name="plain")[0])


def test_a_cache_is_mapped_and_changes_of_it_stay_in_memory(tmp_path):
    cached(tmp_path)[0].zero_()
    assert np.array_equal(cached(tmp_path, job=None)[0], WHOLE)


def test_other_facts_make_another_cache_and_drop_the_old(tmp_path):
    cached(tmp_path)
    old = only_cache(tmp_path)
    cached(tmp_path, facts="other")
    assert only_cache(tmp_path) != old


def test_caches_of_other_names_stay(tmp_path):
    for name in ("events", "events-32", "eve*", "events"):
        cached(tmp_path, name=name)
    assert len(list((tmp_path / ".bntt_cache").iterdir())) == 3


def test_another_version_is_another_cache(tmp_path, monkeypatch):
    cached(tmp_path)
    monkeypatch.setattr(cache, "CACHE_VERSION", cache.CACHE_VERSION + 1)
    with pytest.raises(UserError, match="sample 7"):
        cached(tmp_path, job=broken)


@pytest.mark.parametrize("less", [1, 8, 16, 24, 30, 130, 164])
def test_a_cut_cache_is_made_anew(tmp_path, less):
    cached(tmp_path, summary=Total())
    os.truncate(only_cache(tmp_path), only_cache(tmp_path).stat().st_size - less)
    array, values = cached(tmp_path, summary=Total())
    assert np.array_equal(array, WHOLE)
    assert values == [66, 3]


def test_a_cache_with_more_behind_it_is_made_anew(tmp_path):
    cached(tmp_path)
    with open(only_cache(tmp_path), "ab") as file:
        file.write(b"!")
    assert cached(tmp_path)[1] == []
    assert only_cache(tmp_path).stat().st_size == 128 + 12 + 8


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, call):
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(UserError, match="cannot make .*No space left"):
        cached(tmp_path)
    assert everything(tmp_path) == []


@pytest.mark.parametrize(("job", "message"), [(broken, "sample 7 cannot be read"), (killed, "was terminated abruptly")])
def test_a_job_that_fails_leaves_nothing(tmp_path, job, message):
    with pytest.raises(UserError, match=message):
        cached(tmp_path, job=job)
    assert everything(tmp_path) == []


def test_file_facts_follow_name_size_and_time(tmp_path):
    path = tmp_path / "a" / "b.bin"
    path.parent.mkdir()
    path.write_bytes(b"12345")
    os.utime(path, ns=(0, 7))
    assert cache.file_facts(tmp_path, [path, path]) == "\n".join([f"{Path('a/b.bin')} 5 7"] * 2)


# ---- Downloads -----------------------------------------------------------------------------------

CONTENT = np.random.default_rng(0).bytes(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """Serves CONTENT; the path says what goes wrong. Returns its URL, without the path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/absent":
                return self.send_error(404)
            body = {"/cut": CONTENT[:2_000_000], "/other": CONTENT[::-1]}.get(self.path, CONTENT)
            self.send_response(200)
            self.send_header("Content-Length", len(CONTENT))
            self.end_headers()
            try:
                return self.wfile.write(body)
            except OSError:  # the other side had enough
                return None

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def fetch(url, folder):
    cache.download(url, folder / "set.zip", MD5)


def test_a_download_brings_the_file(server, tmp_path):
    fetch(f"{server}/set.zip", tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "set.zip").read_bytes() == CONTENT
    assert len(everything(tmp_path)) == 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("cut", "corrupted|IncompleteRead"),
        ("other", "corrupted"),
        ("absent", "404"),
    ],
)
def test_a_download_gone_wrong_leaves_nothing_and_can_be_tried_again(server, tmp_path, path, message):
    with pytest.raises(UserError, match=message) as caught:
        fetch(f"{server}/{path}", tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert "put set.zip into" in str(caught.value)
    assert everything(tmp_path) == []
    fetch(f"{server}/set.zip", tmp_path / "new")


def test_no_internet_says_what_to_put_where(tmp_path):
    with pytest.raises(UserError, match="fetch http://nowhere.invalid/x .* put set.zip into"):
        fetch("http://nowhere.invalid/x", tmp_path)


def test_a_disk_full_while_downloading_leaves_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(UserError, match="No space left"):
        fetch(f"{server}/set.zip", tmp_path)
    assert everything(tmp_path) == []


def test_a_whole_file_that_is_there_is_not_fetched(tmp_path):
    (tmp_path / "set.zip").write_bytes(CONTENT)
    fetch(None, tmp_path)


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + b"!"], ids=["cut", "changed"])
def test_a_damaged_file_that_is_there_is_named_and_left_alone(tmp_path, content):
    (tmp_path / "set.zip").write_bytes(content)
    with pytest.raises(UserError, match="set.zip is incomplete or damaged: remove it"):
        fetch("http://nowhere.invalid/x", tmp_path)
    assert (tmp_path / "set.zip").read_bytes() == content


# ---- Archives ------------------------------------------------------------------------------------


def make_zip(path, members):
    """A zip of {name, or ZipInfo: text}."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


GOOD = {"out/a.txt": "a", "out/deep/b.txt": "bb", "other.txt": "c"}


def test_the_folder_of_an_archive_is_unpacked_whole(tmp_path):
    cache.extract_zip(make_zip(tmp_path / "x.zip", GOOD), tmp_path / "out", most_bytes=4)
    assert everything(tmp_path) == ["out", "out/a.txt", "out/deep", "out/deep/b.txt", "x.zip"]


@pytest.mark.parametrize("name", ["../evil", "out/../../evil", "/tmp/evil", "..\\evil", "C:\\evil", "out/link"])
def test_no_member_of_an_archive_lands_outside_its_folder(tmp_path, name):
    (tmp_path / "in").mkdir()
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16  # a link, to what it holds
    path = make_zip(tmp_path / "in" / "x.zip", GOOD | {member: "/etc/passwd"})
    cache.extract_zip(path, tmp_path / "in" / "out", most_bytes=100)
    assert {name.split("/")[0] for name in everything(tmp_path)} == {"in"}
    assert {path.name for path in (tmp_path / "in").iterdir()} == {"out", "x.zip"}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"out/bomb": "0" * 1001}, "more than 1,000 bytes"),
        ({"out/a": "0" * 600, "out/b": "0" * 600}, "more than 1,000 bytes"),
        ({"elsewhere/a": "0"}, "must hold out/"),
        ({"out": "a", "out/b": "b"}, "cannot make"),
    ],
)
def test_an_archive_that_is_not_what_it_should_be_is_one_sentence_and_leaves_nothing(tmp_path, members, message):
    path = make_zip(tmp_path / "x.zip", members)
    with pytest.raises(UserError, match=message) as caught:
        cache.extract_zip(path, tmp_path / "out", most_bytes=1000)
    assert "\n" not in str(caught.value)
    assert everything(tmp_path) == ["x.zip"]


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "lying"])
def test_a_damaged_archive_is_one_sentence(tmp_path, damage):
    path = make_zip(tmp_path / "x.zip", GOOD | {"out/big": np.random.default_rng(0).bytes(5000)})
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[2000] ^= 255
    if damage == "lying":  # members that unpack to more than they declare are cut there, and fail their checksum
        make_zip(path, {"out/zeros": "0" * 100_000})
        content = path.read_bytes().replace((100_000).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    path.write_bytes({"cut": content[:-100], "empty": b""}.get(damage, content))
    with pytest.raises(UserError, match="cannot make .*: fetch .*x.zip again"):
        cache.extract_zip(path, tmp_path / "out", most_bytes=10_000)
    assert everything(tmp_path) == ["x.zip"]


def test_an_encrypted_archive_is_one_sentence(tmp_path):
    path = make_zip(tmp_path / "x.zip", {"a": "b"})
    content = bytearray(path.read_bytes())
    content[6] |= 1  # the flags in the member's header, and in the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="fetch .*x.zip again"):
        cache.extract_zip(path, tmp_path / "out", most_bytes=10)


def test_a_disk_full_while_unpacking_leaves_nothing(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "x.zip", GOOD)
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(UserError, match="cannot make .*No space left"):
        cache.extract_zip(path, tmp_path / "out", most_bytes=10)
    assert everything(tmp_path) == ["x.zip"]
