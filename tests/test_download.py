"""download.py against a PhysioNet on this machine that cuts, stalls, lies and refuses on demand."""
import itertools
import random
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import urllib3
from conftest import ROOT, reset_signals, run_script
from mirror import Mirror
from small import read_all
from test_preprocess import write_ptbxl

import preprocess
from ecg import download
from utils import UserError

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


def fetch(mirror, folder, flag="download", rate=100, connections=8):
    download.fetch(flag, folder, rate, mirror.url, connections)


def refuse(mirror, folder, *words):
    """One sentence that says these words."""
    with pytest.raises(UserError) as caught:
        fetch(mirror, folder)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value


def expected(mirror, start, place=PTBXL):
    """The files that must be there: those of the list that begin so, and the list."""
    return {name.removeprefix(place): content for name, content in mirror.files.items()
            if name.removeprefix(place).startswith((*start, "SHA256SUMS.txt")) and name.startswith(place)}


AT_100 = (*TABLES, "records100/")


def check_whole(mirror, folder):
    assert read_all(folder) == expected(mirror, AT_100)


@pytest.mark.parametrize("flag, rate, start, place", [
    ("download", 100, AT_100, PTBXL), ("download", 500, (*TABLES, "records500/"), PTBXL),
    ("download_ludb", 100, ("RECORDS", "ludb.csv", "LICENSE.txt", "data/"), LUDB)])
def test_what_is_asked_for_is_fetched_and_nothing_else(mirror, tmp_path, flag, rate, start, place):
    """The other rate is two gigabytes that nobody asked for; the tables must come at either; LUDB has another list."""
    fetch(mirror, tmp_path / "new" / "folder", flag, rate)
    assert read_all(tmp_path / "new" / "folder") == expected(mirror, start, place)
    assert sorted(name for name, _ in mirror.log) == sorted(place + name for name in expected(mirror, start, place))


def test_a_second_run_transfers_what_is_missing_or_damaged_and_nothing_else(mirror, tmp_path, capsys):
    """Whole files are never fetched again; a file of the right name and size is not thereby whole."""
    fetch(mirror, tmp_path)
    mirror.log.clear()
    fetch(mirror, tmp_path)
    assert [name for name, _ in mirror.log] == [PTBXL + "SHA256SUMS.txt"]
    assert "19 of 19 files are there already" in capsys.readouterr().out
    (tmp_path / RECORD).write_bytes(bytes(24_000))
    (tmp_path / "scp_statements.csv").unlink()
    mirror.log.clear()
    fetch(mirror, tmp_path)
    assert {name for name, _ in mirror.log[1:]} == {PTBXL + RECORD, PTBXL + "scp_statements.csv"}
    check_whole(mirror, tmp_path)


@pytest.mark.parametrize("name, fault, detail", [
    *((name, fault, detail) for name in (RECORD, "SHA256SUMS.txt") for fault, detail in (
        ("drop", None), ("status", (503, {})), ("status", (429, {"Retry-After": "7"})))),
    (RECORD, "cut", None), (RECORD, "wrong", None)])
def test_a_passing_failure_is_waited_out(mirror, tmp_path, sleeps, name, fault, detail):
    """Among forty thousand requests some fail, a transfer is cut off, a byte is wrong: the file is fetched again."""
    times = 3 if name == RECORD else 1
    mirror.faults[PTBXL + name] = itertools.repeat((fault, detail), times)
    fetch(mirror, tmp_path)
    assert mirror.asked(PTBXL + name) == 1 + times
    assert sleeps == [7] * len(sleeps) if detail and detail[1] else max(sleeps, default=0) <= download.LONGEST_WAIT
    check_whole(mirror, tmp_path)


@pytest.mark.parametrize("fault", [("cut", None), ("drop", None), ("status", (503, {}))])
def test_a_server_that_fails_for_ever(mirror, tmp_path, sleeps, fault):
    """The waiting has an end, and what has come stays for the next attempt."""
    mirror.faults[PTBXL + RECORD] = itertools.repeat(fault)
    refuse(mirror, tmp_path, PTBXL + RECORD, "--base_url", "goes on")
    assert mirror.asked(PTBXL + RECORD) == (download.TRIES if fault[0] == "cut" else download.RETRIES + 1)
    assert 1 < sum(sleeps) < 70 and not (tmp_path / RECORD).exists()
    mirror.faults.clear()
    fetch(mirror, tmp_path)
    check_whole(mirror, tmp_path)


def test_a_stalled_transfer_is_begun_again(mirror, tmp_path, monkeypatch):
    """A silent connection must not hold up the download for ever."""
    monkeypatch.setattr(download, "TIMEOUT", (5, 0.3))
    mirror.faults[PTBXL + RECORD] = iter([("stall", None)])
    fetch(mirror, tmp_path)
    assert mirror.asked(PTBXL + RECORD) == 2
    check_whole(mirror, tmp_path)


def test_files_that_cannot_be_had_are_named(mirror, tmp_path):
    """One that is wrong for ever and one that the server lacks: all else comes, and neither gets its name."""
    gone = "records100/00000/00002_lr.hea"
    mirror.faults[PTBXL + RECORD] = itertools.repeat(("wrong", None))
    del mirror.files[PTBXL + gone]
    refuse(mirror, tmp_path, "2 of the files", f"{RECORD}: not what SHA256SUMS.txt says, 4 times",
           f"{gone}: 404 Not Found", "--allow_missing")
    assert mirror.asked(PTBXL + RECORD) == download.TRIES
    there = expected(mirror, AT_100)
    del there[RECORD]
    assert read_all(tmp_path) == there


def test_a_mirror_without_recordings_is_soon_given_up(mirror, tmp_path, monkeypatch):
    """Nobody should ask for 43,600 files of which the first hundreds are not there."""
    monkeypatch.setattr(download, "MOST_FAULTS", 4)
    mirror.files = {name: content for name, content in mirror.files.items() if "records100" not in name}
    refuse(mirror, tmp_path, "4 of the files", "404")


def test_connections_work_in_parallel_and_are_kept(mirror, tmp_path):
    """Small files over a long line: the time is that of the round trips, so several at once and no new connections."""
    together = threading.Barrier(5, timeout=10)
    mirror.faults = {name: iter([("meet", together)]) for name in mirror.files
                     if re.search("records100/.*(1|2|3|4|5)_lr.hea", name)}
    mirror.publish(PTBXL, {name.removeprefix(PTBXL): content for name, content in reversed(mirror.files.items())
                           if name.startswith(PTBXL) and "SHA" not in name})
    fetch(mirror, tmp_path, connections=5)
    assert len(mirror.log) == 20 and 5 <= len({peer for _, peer in mirror.log}) <= 6
    check_whole(mirror, tmp_path)


def test_an_interrupt_ends_at_once_and_keeps_whole_files(mirror, tmp_path):
    """Ctrl-C in front of silent connections: no wait for their time-outs, no trace, and the next run goes on."""
    stalled = sorted(name for name in mirror.files if "records100" in name)[8:]
    mirror.faults = {name: iter([("stall", None)]) for name in stalled}
    process = subprocess.Popen([sys.executable, str(ROOT / "preprocess.py"), "--download", str(tmp_path), "--base_url",
                                mirror.url, "--sampling_rate", "100", "--data_path", str(tmp_path / "data")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=reset_signals)
    try:
        deadline = time.monotonic() + 60
        while sum(mirror.asked(name) for name in stalled) < 8:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=20)[1]          # less than the 30 s that a silent connection may take
    finally:
        process.kill()
    assert process.returncode == 130 and error.splitlines()[-1] == "interrupted" and "Traceback" not in error
    mirror.faults.clear()
    mirror.log.clear()
    fetch(mirror, tmp_path)
    assert len(mirror.log) < 20
    check_whole(mirror, tmp_path)


OUTSIDE = ["../x", "/x", "records100/../../x", r"records100\..\x", "C:x", "a//x", "a\0b"]


@pytest.mark.parametrize("text, words", [
    ("<html>Please log in", ("<html>", "login")), ("", ("does not list",)), (None, ("404", "--base_url")),
    ("0" * 64 + " scp_statements.csv\n", ("ptbxl_database.csv", "records100/")),
    *(("0" * 64 + f" scp_statements.csv\n{'0' * 64} {name}\n", (repr(name),)) for name in OUTSIDE)])
def test_a_list_that_is_none(mirror, tmp_path, text, words):
    """A hotel's login page, no list, one of something else or with names outside the folder: nothing is fetched."""
    mirror.files[PTBXL + "SHA256SUMS.txt"] = None if text is None else text.encode()
    refuse(mirror, tmp_path / "inside", "SHA256SUMS.txt", *words)
    assert len(mirror.log) == 1 and set(read_all(tmp_path)) <= {"inside/SHA256SUMS.txt"}


def test_no_network(mirror, tmp_path, sleeps):
    """The URL and the remedy, and soon: not after a minute of attempts. A forgotten https:// is told from it."""
    mirror.shutdown()
    mirror.server_close()
    refuse(mirror, tmp_path, mirror.url + PTBXL, "refused", "check the network")
    assert not sleeps
    mirror.url = "physionet.org/files"
    refuse(mirror, tmp_path, "--base_url", "https://")


def test_a_folder_that_cannot_be_written(mirror, tmp_path):
    """A file where the folder should be, a full disk, and a folder of simulated ECGs: one sentence each."""
    (tmp_path / "file").touch()
    refuse(mirror, tmp_path / "file", "--download", "could not be written")
    (tmp_path / "simulated").mkdir()
    (tmp_path / "simulated" / download.SIMULATED_MARKER).touch()
    refuse(mirror, tmp_path / "simulated", "--download", "simulated ECGs")
    (tmp_path / "records100" / "00000").mkdir(parents=True)
    (tmp_path / RECORD).mkdir()
    refuse(mirror, tmp_path, "00001_lr.dat could not be written")


def test_one_command_leads_from_nothing_to_the_arrays(mirror, tmp_path, monkeypatch):
    """--download is worth as much as a folder made by hand: the records are read there, without naming it twice."""
    mirror.publish(PTBXL, read_all(write_ptbxl(tmp_path / "hand", 100)))
    tasks = []
    monkeypatch.setattr(preprocess, "prepare_all", lambda _, chosen, workers: tasks.extend(chosen) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_script("preprocess.py", "--download", tmp_path / "new", "--base_url", mirror.url, "--sampling_rate", 100,
                   "--data_path", tmp_path / "data")
    assert len(mirror.log) == len(set(mirror.log)) == 83 and tasks
    assert all(str(tmp_path / "new") in str(task) for task in tasks)
