"""download.py against a PhysioNet on this machine that cuts, stalls, lies and refuses on demand."""
import argparse
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import urllib3
from conftest import ROOT, run_script
from mirror import CUT, Mirror
from test_preprocess import write_ptbxl

from ecg import download
from utils import run

PTBXL, LUDB = "ptb-xl/1.0.3/", "ludb/1.0.1/"
TABLES = ("ptbxl_database.csv", "scp_statements.csv", "LICENSE.txt")
RECORD = "records100/00000/00001_lr.dat"


@pytest.fixture
def mirror():
    """A mirror with a small PTB-XL at both rates and a small LUDB."""
    content = random.Random(0).randbytes
    names = [f"records{rate}/0{n // 5}000/{n:05d}_{kind}.{end}" for n in range(1, 9)
             for rate, kind in ((100, "lr"), (500, "hr")) for end in ("hea", "dat")]
    server = Mirror()
    server.publish(PTBXL, {name: content(24_000) for name in (*names, *TABLES, "RECORDS", "example_physionet.py")})
    server.publish(LUDB, {name: content(900) for name in ("RECORDS", "ludb.csv", "LICENSE.txt", "ludb.pdf",
                                                          "data/1.dat", "data/1.ii", "data/2.dat", "data/2.ii")})
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def sleeps(monkeypatch):
    """Nobody waits: the seconds of each wait between two requests, by our loop and by urllib3's."""
    waited = []
    for module in (download, urllib3.util.retry):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waited.append, time=time.time,
                                                            monotonic=time.monotonic))
    return waited


def arguments_of(*flags):
    parser = argparse.ArgumentParser()
    for name in ("--ptbxl_path", "--ludb_path"):
        parser.add_argument(name)
    parser.add_argument("--sampling_rate", type=int, default=100)
    download.add_flags(parser)
    return parser.parse_args([*map(str, flags)])


def fetch(mirror, folder, *flags, flag="--download"):
    download.fetch(arguments_of(flag, folder, "--base_url", mirror.url, *flags))


def check_refusal(capsys, words, *flags):
    """Exit code 2 and one sentence that says these words."""
    with pytest.raises(SystemExit) as ended:
        run(lambda: download.fetch(arguments_of(*flags)))
    sentence, = re.findall("^error: .*", capsys.readouterr().err, re.MULTILINE)
    assert ended.value.code == 2 and all(word in sentence for word in words), sentence


def refuse(capsys, mirror, folder, *words):
    check_refusal(capsys, words, "--download", folder, "--base_url", mirror.url)


def read_all(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected(mirror, start, place=PTBXL):
    """The files that must be there: those of the list that begin so, and the list."""
    return {name.removeprefix(place): content for name, content in mirror.files.items()
            if name.removeprefix(place).startswith((*start, "SHA256SUMS.txt")) and name.startswith(place)}


AT_100 = (*TABLES, "records100/")


def check_whole(mirror, folder):
    assert read_all(folder) == expected(mirror, AT_100)


@pytest.mark.parametrize("rate", [100, 500])
def test_only_the_rate_asked_for_is_fetched(mirror, tmp_path, rate):
    """The other rate is two gigabytes that nobody asked for; the tables must come at either."""
    fetch(mirror, tmp_path / "new" / "folder", "--sampling_rate", rate)
    wanted = expected(mirror, (*TABLES, f"records{rate}/"))
    assert read_all(tmp_path / "new" / "folder") == wanted
    assert sorted(name for name, _, _ in mirror.log) == sorted(PTBXL + name for name in wanted)


def test_ludb(mirror, tmp_path):
    """LUDB has another list and another layout, and comes without PTB-XL."""
    fetch(mirror, tmp_path, flag="--download_ludb")
    assert read_all(tmp_path) == expected(mirror, ("RECORDS", "ludb.csv", "LICENSE.txt", "data/"), LUDB)
    assert not any(name.startswith(PTBXL) for name, _, _ in mirror.log)


def test_a_second_run_transfers_what_is_missing_or_damaged_and_nothing_else(mirror, tmp_path, capsys):
    """Whole files are never fetched again; a file of the right name and size is not thereby whole."""
    fetch(mirror, tmp_path)
    mirror.log.clear()
    fetch(mirror, tmp_path)
    assert [name for name, _, _ in mirror.log] == [PTBXL + "SHA256SUMS.txt"]
    assert "19 of 19 files are there already" in capsys.readouterr().out
    (tmp_path / RECORD).write_bytes(bytes(24_000))
    (tmp_path / "scp_statements.csv").unlink()
    mirror.log.clear()
    fetch(mirror, tmp_path)
    assert {name for name, _, _ in mirror.log[1:]} == {PTBXL + RECORD, PTBXL + "scp_statements.csv"}
    assert "17 of 19 files are there already" in capsys.readouterr().out
    check_whole(mirror, tmp_path)


def test_a_cut_transfer_asks_for_the_missing_bytes_alone(mirror, tmp_path, sleeps):
    """Over a bad line a file must come on with every attempt, however often it is cut; so must the list."""
    mirror.faults = {PTBXL + name: itertools.repeat(("cut", None), 4) for name in (RECORD, "ptbxl_database.csv")}
    mirror.faults[PTBXL + "SHA256SUMS.txt"] = iter([("drop", None)])
    fetch(mirror, tmp_path)
    for name in (RECORD, "ptbxl_database.csv"):
        assert mirror.asked(PTBXL + name) == [0, CUT, 2 * CUT, 3 * CUT, 4 * CUT]
    assert len(sleeps) == 8 and all(1 <= seconds <= 2 for seconds in sleeps)    # progress: the wait does not grow
    check_whole(mirror, tmp_path)


def test_a_part_of_an_earlier_run_is_completed(mirror, tmp_path):
    """What an interrupted run left counts: a part, and a part that is whole but was not renamed any more."""
    content, other = mirror.files[PTBXL + RECORD], "records100/00000/00002_lr.hea"
    (tmp_path / RECORD).parent.mkdir(parents=True)
    (tmp_path / (RECORD + ".part")).write_bytes(content[:777])
    (tmp_path / (other + ".part")).write_bytes(mirror.files[PTBXL + other])
    fetch(mirror, tmp_path)
    assert mirror.asked(PTBXL + RECORD) == [777] and mirror.asked(PTBXL + other) == [24_000]
    check_whole(mirror, tmp_path)


def test_a_part_of_something_else_is_given_up(mirror, tmp_path):
    """A damaged part can be resumed for ever without becoming the file; a part of the list nothing can check."""
    (tmp_path / RECORD).parent.mkdir(parents=True)
    (tmp_path / "SHA256SUMS.txt.part").write_bytes(b"of another version")
    (tmp_path / (RECORD + ".part")).write_bytes(bytes(777))
    fetch(mirror, tmp_path)
    assert mirror.asked(PTBXL + RECORD) == [777, 0]
    check_whole(mirror, tmp_path)


def test_a_server_without_ranges_starts_the_file_over(mirror, tmp_path):
    """Its whole file appended to the part that is there would be neither."""
    longer = "scp_statements.csv"
    (tmp_path / (longer + ".part")).write_bytes(bytes(30_000))
    mirror.faults[PTBXL + RECORD] = iter([("no range", "cut"), ("no range", None)])
    mirror.faults[PTBXL + longer] = iter([("no range", None)])
    fetch(mirror, tmp_path)
    assert mirror.asked(PTBXL + RECORD) == [0, CUT] and mirror.asked(PTBXL + longer) == [30_000]
    check_whole(mirror, tmp_path)


def test_a_server_without_ranges_that_always_cuts_is_given_up(mirror, tmp_path, capsys, sleeps):
    """Bytes that come again and again are no progress, or the download would never end."""
    mirror.faults[PTBXL + RECORD] = itertools.repeat(("no range", "cut"))
    refuse(capsys, mirror, tmp_path, RECORD, "more expected", "--base_url")
    assert len(mirror.asked(PTBXL + RECORD)) == download.RETRIES + 1 and sleeps[-1] >= download.LONGEST_WAIT / 2


@pytest.mark.parametrize("fault", [("drop", None), ("status", (503, {})), ("status", (429, {"Retry-After": "7"}))])
def test_a_passing_failure_is_waited_out(mirror, tmp_path, sleeps, fault):
    """Among forty thousand requests some fail: the next attempts wait longer each time, or as the server says."""
    mirror.faults[PTBXL + RECORD] = itertools.repeat(fault, 3)
    fetch(mirror, tmp_path)
    assert mirror.asked(PTBXL + RECORD) == [0, 0, 0, 0]
    if fault[1] and fault[1][1]:
        assert sleeps == [7, 7, 7]
    else:
        assert [int(seconds) for seconds in sleeps] == [2, 4] and sleeps[0] % 1        # at once, 2 to 3 s, 4 to 5 s
    check_whole(mirror, tmp_path)


def test_a_server_that_fails_for_ever(mirror, tmp_path, capsys, sleeps):
    """The waiting has an end, and what has come stays for the next attempt."""
    mirror.faults[PTBXL + RECORD] = itertools.repeat(("status", (503, {})))
    refuse(capsys, mirror, tmp_path, PTBXL + RECORD, "503", "--base_url", "goes on")
    assert len(mirror.asked(PTBXL + RECORD)) == download.RETRIES + 1 and 60 < sum(sleeps) < 70
    assert not (tmp_path / RECORD).exists()
    mirror.faults.clear()
    fetch(mirror, tmp_path)
    check_whole(mirror, tmp_path)


def test_a_stalled_transfer_is_resumed(mirror, tmp_path, monkeypatch):
    """A silent connection must not hold up the download for ever, nor lose what it brought."""
    monkeypatch.setattr(download, "TIMEOUT", (5, 0.3))
    mirror.faults[PTBXL + RECORD] = iter([("stall", None)])
    fetch(mirror, tmp_path)
    assert mirror.asked(PTBXL + RECORD) == [0, CUT]
    check_whole(mirror, tmp_path)


def test_a_wrong_byte_once(mirror, tmp_path):
    """A file damaged on its way is fetched again, all of it."""
    mirror.faults[PTBXL + RECORD] = iter([("wrong", None)])
    fetch(mirror, tmp_path)
    assert mirror.asked(PTBXL + RECORD) == [0, 0]
    check_whole(mirror, tmp_path)


def test_files_that_cannot_be_had_are_named(mirror, tmp_path, capsys):
    """One that is wrong for ever and one that the server lacks: all else comes, and neither gets its name."""
    gone = "records100/00000/00002_lr.hea"
    mirror.faults[PTBXL + RECORD] = itertools.repeat(("wrong", None))
    del mirror.files[PTBXL + gone]
    refuse(capsys, mirror, tmp_path, "2 of the files", f"{RECORD}: not what SHA256SUMS.txt says, 3 times",
           f"{gone}: 404 Not Found", "--allow_missing")
    assert len(mirror.asked(PTBXL + RECORD)) == download.TRIES
    there = expected(mirror, AT_100)
    del there[RECORD]
    assert read_all(tmp_path) == there


def test_a_mirror_without_recordings_is_soon_given_up(mirror, tmp_path, capsys, monkeypatch):
    """Nobody should ask for 43,600 files of which the first hundreds are not there."""
    monkeypatch.setattr(download, "MOST_FAULTS", 4)
    mirror.files = {name: content for name, content in mirror.files.items() if "records100" not in name}
    refuse(capsys, mirror, tmp_path, "4 of the files", "404")
    assert not list(tmp_path.glob("records100/**/*.dat"))


def test_connections_work_in_parallel_and_are_kept(mirror, tmp_path):
    """Small files over a long line: the time is that of the round trips, so several at once and no new connections."""
    together = threading.Barrier(5, timeout=10)
    mirror.faults = {name: iter([("meet", together)]) for name in mirror.files
                     if re.search("records100/.*(1|2|3|4|5)_lr.hea", name)}
    mirror.publish(PTBXL, {name.removeprefix(PTBXL): content for name, content in reversed(mirror.files.items())
                           if name.startswith(PTBXL) and "SHA" not in name})
    fetch(mirror, tmp_path, "--connections", 5)
    assert len(mirror.log) == 20 and 5 <= len({peer for _, _, peer in mirror.log}) <= 6
    check_whole(mirror, tmp_path)


def test_an_interrupt_ends_at_once_and_keeps_the_parts(mirror, tmp_path):
    """Ctrl-C in front of silent connections: no wait for their time-outs, no trace, and the next run goes on."""
    stalled = sorted(name for name in mirror.files if "records100" in name)[:8]
    mirror.faults = {name: iter([("stall", None)]) for name in stalled}
    parts = [tmp_path / (name.removeprefix(PTBXL) + ".part") for name in stalled]
    process = subprocess.Popen([sys.executable, str(ROOT / "preprocess.py"), "--download", str(tmp_path), "--base_url",
                                mirror.url, "--sampling_rate", "100", "--data_path", str(tmp_path / "data")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    deadline = time.monotonic() + 20
    while not all(part.exists() and part.stat().st_size == CUT for part in parts):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    error = process.communicate(timeout=20)[1]
    assert time.monotonic() - sent < 3 and process.returncode == 130
    assert error.splitlines()[-1] == "interrupted" and "Traceback" not in error
    for name, part in zip(stalled, parts):
        assert part.read_bytes() == mirror.files[name][:CUT] and not part.with_suffix("").exists()
    fetch(mirror, tmp_path)
    assert all(mirror.asked(name) == [0, CUT] for name in stalled)
    check_whole(mirror, tmp_path)


@pytest.mark.parametrize("name", ["../x", "/x", "records100/../../x", r"records100\..\x", "C:x", "a//x", "a\0b"])
def test_a_name_that_leads_out_of_the_folder_is_refused(mirror, tmp_path, capsys, name):
    """The list comes from elsewhere and names files to write."""
    mirror.publish(PTBXL, {"ptbxl_database.csv": b"1", "scp_statements.csv": b"2", RECORD: b"3", name: b"4"})
    refuse(capsys, mirror, tmp_path / "inside", "SHA256SUMS.txt", repr(name))
    assert len(mirror.log) == 1 and set(read_all(tmp_path)) == {"inside/SHA256SUMS.txt.part"}


@pytest.mark.parametrize("text, words", [("<html>Please log in", ("<html>", "login")), ("", ("does not list",)),
                                         (None, ("404", "--base_url")),
                                         ("0" * 64 + " scp_statements.csv\n", ("ptbxl_database.csv", "records100/"))])
def test_a_list_that_is_none(mirror, tmp_path, capsys, text, words):
    """A hotel's login page, no list, or one of something else, is no reason to fetch or to delete anything."""
    mirror.files[PTBXL + "SHA256SUMS.txt"] = None if text is None else text.encode()
    refuse(capsys, mirror, tmp_path, "SHA256SUMS.txt", *words)
    assert len(mirror.log) == 1


def test_no_network(mirror, tmp_path, capsys, sleeps):
    """The URL and the remedy, and soon: not after a minute of attempts."""
    mirror.shutdown()
    mirror.server_close()
    refuse(capsys, mirror, tmp_path, mirror.url + PTBXL, "refused", "check the network")
    assert not sleeps


def test_a_base_url_that_is_none(tmp_path, capsys):
    """A forgotten https:// is a mistake of the command line, not of the network."""
    check_refusal(capsys, ["--base_url", "https://"], "--download", tmp_path, "--base_url", "physionet.org/files")


def test_a_folder_that_cannot_be_written(mirror, tmp_path, capsys):
    """A file where the folder should be, a full disk, and a folder of simulated ECGs: one sentence each."""
    (tmp_path / "file").touch()
    refuse(capsys, mirror, tmp_path / "file", "--download", "could not be written")
    (tmp_path / "simulated").mkdir()
    (tmp_path / "simulated" / download.SIMULATED_MARKER).touch()
    refuse(capsys, mirror, tmp_path / "simulated", "--download", "simulated ECGs")
    if os.path.exists("/dev/full"):
        (tmp_path / RECORD).parent.mkdir(parents=True)
        (tmp_path / (RECORD + ".part")).symlink_to("/dev/full")
        refuse(capsys, mirror, tmp_path, "--download", "No space left on device")


def test_one_command_leads_from_nothing_to_the_arrays(mirror, tmp_path):
    """--download is worth as much as a folder made by hand: the same arrays, without naming the folder twice."""
    mirror.publish(PTBXL, read_all(write_ptbxl(tmp_path / "by_hand", 100)))
    for source in (("--ptbxl_path", tmp_path / "by_hand"), ("--download", tmp_path / "new", "--base_url", mirror.url)):
        finished = run_script("preprocess.py", *source, "--sampling_rate", 100, "--workers", 1, "--data_path",
                              tmp_path / f"data{source[0]}")
        assert finished.returncode == 0, finished.stderr
    for name in ("train.npy", "val.npy", "test.npy", "val_label.npy", "label.npy"):
        by_hand, downloaded = (np.load(tmp_path / f"data{flag}" / name) for flag in ("--ptbxl_path", "--download"))
        assert len(by_hand) and np.array_equal(by_hand, downloaded)
    assert len(mirror.log) == len(set(mirror.log)) == 83


def test_a_named_folder_stays_the_one_that_is_read():
    """--download names the folder to read only where no flag does."""
    found = download.name_paths(arguments_of("--download", "a", "--ptbxl_path", "b", "--download_ludb", "c"))
    assert (found.ptbxl_path, found.ludb_path) == ("b", "c")
