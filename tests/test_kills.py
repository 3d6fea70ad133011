"""Signals, and SIGKILL, which no program can catch."""
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import utils


def test_kill_in_a_write_leaves_the_old_file(tmp_path):
    """A file that was being written is the old one or the new one, never a part."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = ("import os, sys; sys.path.insert(0, sys.argv[1]); import utils\nutils.write_atomically("
            "sys.argv[2], lambda file: (file.write(b'new'), file.flush(), os.kill(os.getpid(), 9)))")
    process = subprocess.run([sys.executable, "-c", code, str(ROOT), str(path)])
    assert process.returncode == -9 and path.read_bytes() == b"old"
    utils.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_script_in_a_word(number, capsys):
    """Exit code 130 and no traceback."""
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)            # a background job's ignores it
    try:
        with pytest.raises(SystemExit, match="130"):
            utils.run(lambda: (os.kill(os.getpid(), number), time.sleep(60)))
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert capsys.readouterr().err == "interrupted\n"
