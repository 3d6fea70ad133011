"""The 200 records of LUDB as PhysioNet has them: what is counted in them, and where cardiologists saw the beats."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import wfdb
from conftest import SHARED

from ecg import ludb, signals
from ecg.r_peaks import find_r_peaks_by_slope
from ecg.wfdb_files import read_record


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """LUDB's records, number to path: of the folder that the environment's LUDB names, else from ../shared/data."""
    path = Path(os.environ.get("LUDB", tmp_path_factory.mktemp("unpacked") / "ludb"))
    if "LUDB" not in os.environ:
        if not (SHARED / "data" / "ludb").is_dir():
            pytest.skip("no ../shared/data/ludb here; name LUDB's folder in the environment as LUDB")
        pytest.importorskip("soundfile", reason="soundfile is not installed, and unpacks LUDB")
        subprocess.run([sys.executable, SHARED / "data" / "unpack.py", path.parent, "ludb"], check=True,
                       capture_output=True)
    return ludb.present_records(ludb.list_records(path), path, False)


def test_all_records_are_read_and_counted(real):
    """As many diagnoses and points as counted."""
    assert ludb.source_of(real)["version"] == ludb.VERSIONS[200] and len(real) == 200
    audit = ludb.Audit(len(real), 0)
    for path in real.values():
        comments, phases = ludb.read_comments(path), ludb.read_phases(path)
        diagnoses, person = ludb.diagnoses_in(comments), ludb.person_in(comments)
        assert person["sex"] in ("F", "M") and 10 < (person["age"] or 90) <= 90
        audit.add(phases, diagnoses, ludb.mark(phases, diagnoses), [1])
    counts = audit.summary
    assert (counts["annotated"], counts["marked"], counts["with marks"]) == (8_717_961, 2_540_019, 165)
    assert [of["records"] for of in counts["rules"].values()] == [17, 50, 110, 11, 120, 18, 10, 43, 17, 49]
    assert not any(word in line for line in counts["unplaced"] for word in ("infarct", "STEMI", "hypertrophy"))


def test_the_cardiologists_agree_on_the_r_peaks(real):
    """A beat: a QRS marked in lead II. Beats found before the first or after the last annotation count neither way."""
    beats = right = peaks_inside = 0
    for path in real.values():
        marked = wfdb.rdann(str(path), "ii")
        qrs = ludb.delineate(marked.sample, marked.symbol) == 1 + ludb.PHASES.index("QRS")
        edges = np.flatnonzero(np.diff(qrs, prepend=False, append=False))
        truth = (edges[::2] + edges[1::2] - 1) / 2
        peaks = find_r_peaks_by_slope(signals.filter_leads(read_record(path, ludb.SAMPLING_RATE)))
        near = np.abs(peaks[:, None] - truth) <= 37         # 74 ms
        assert (near.sum(axis=0) <= 1).all()
        beats, right = beats + len(truth), right + np.count_nonzero(near.any(axis=0))
        inside = (peaks >= marked.sample[0]) & (peaks <= marked.sample[-1])
        peaks_inside += np.count_nonzero(inside | near.any(axis=1))
    assert beats > 1800 and right / beats >= 0.995 and right / peaks_inside >= 0.99
