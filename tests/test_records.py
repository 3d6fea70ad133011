"""Hard records from the WFDB file to the score: the names of these tests are the table of what was tried."""
import numpy as np
import pandas as pd
import pytest
from conftest import run_script
from small import beats_at, every, few_channels, make_model, write_wfdb  # noqa: F401

from ecg import arrays, signals
from scoring.passes import Scorer
from scoring.protocols import PROTOCOLS

LEADS = list(signals.LEAD_NAMES)


def without(lead, value):
    ecg = beats_at(every(0.8))
    ecg[:, lead] = value
    return ecg


def paced():
    """A narrow spike 80 ms before every wide QRS, exactly regular."""
    times = np.arange(0.5, 9.8, 0.857)
    return 2.5 * beats_at(times - 0.08, width=0.001) + beats_at(times, width=0.05)


def write(path, ecg, edit=None, cut=None, **options):
    """A WFDB record; edit: (old, new) in its header, or all of it; cut: what becomes of the .dat's bytes."""
    header, data = (write_wfdb(path, ecg, **options).with_suffix(end) for end in (".hea", ".dat"))
    if edit:
        old, new = edit if len(edit) == 2 else (header.read_text(), *edit)
        assert old in header.read_text()
        header.write_text(header.read_text().replace(old, new))
    if cut:
        data.write_bytes(cut(data.read_bytes()))


NORMAL = beats_at(every(0.8))
SHUFFLED = np.random.default_rng(0).permutation(12)
SAME = ("another order of leads", "leads named AVR", "leads named avr", "gain 200", "microvolts", "a baseline of 150",
        "a gain without a unit, which means mV")         # as the ordinary one
# name: (arguments of write, the reason of the audit, or (fewest, most) R peaks where it is scored)
RECORDS = {
    "an ordinary one": ({"ecg": NORMAL}, (12, 12)),
    "lead V1 flat at 0.3 mV": ({"ecg": without(6, 0.3)}, (12, 12)),
    "lead II flat, where R peaks are found": ({"ecg": without(1, 0.3)}, (0, 0)),
    "all zero": ({"ecg": 0 * NORMAL}, (0, 0)),
    "saturated at the converter's ends": ({"ecg": np.clip(40 * NORMAL - 3, -32.7, 32.7)}, (12, 12)),
    "all at the converter's end": ({"ecg": 0 * NORMAL + 32.767}, (0, 0)),
    "noise": ({"ecg": np.random.default_rng(1).normal(0, 0.1, (5000, 12))}, (0, 40)),
    "one beat": ({"ecg": beats_at([4.0])}, (0, 1)),
    "one beat at the very end": ({"ecg": beats_at([9.99])}, (0, 1)),
    "25 beats": ({"ecg": beats_at(every(0.39))}, (24, 25)),
    "30 beats, over 180 a minute": ({"ecg": beats_at(every(0.32))}, (0, 30)),
    "a paced rhythm": ({"ecg": paced()}, (0, 12)),
    "another order of leads": ({"ecg": NORMAL[:, SHUFFLED], "leads": [LEADS[lead] for lead in SHUFFLED]}, (12, 12)),
    "leads named AVR": ({"ecg": NORMAL, "leads": [lead.upper() for lead in LEADS]}, (12, 12)),
    "leads named avr": ({"ecg": NORMAL, "leads": [lead.lower() for lead in LEADS]}, (12, 12)),
    "gain 200": ({"ecg": NORMAL, "gain": 200.0}, (12, 12)),
    "a baseline of 150": ({"ecg": NORMAL, "baseline": [150] * 12}, (12, 12)),
    "microvolts": ({"ecg": NORMAL * 1000, "gain": 5.0, "unit": "uV"}, (12, 12)),
    "lead V6 absent": ({"ecg": NORMAL[:, :11], "leads": LEADS[:11]}, "no lead V6"),
    "lead II twice": ({"ecg": NORMAL, "edit": (" I\n", " II\n")}, "more than one lead II"),
    "lead V6 twice": ({"ecg": np.c_[NORMAL, NORMAL[:, 0]], "leads": [*LEADS, "v6"]}, "more than one lead V6"),
    "lead V3 missing (NaN)": ({"ecg": without(8, np.nan)}, "missing samples in lead V3"),
    "9 s": ({"ecg": NORMAL[:4500]}, "9 s long, expected 10"),
    "11 s": ({"ecg": np.r_[NORMAL, NORMAL[:500]]}, "11 s long, expected 10"),
    "250 Hz": ({"ecg": NORMAL[::2], "rate": 250}, "sampled at 250 Hz, expected 500"),
    "unit mmHg": ({"ecg": NORMAL, "unit": "mmHg"}, "lead I is in 'mmHg'"),
    "a gain of 1e-300": ({"ecg": NORMAL, "edit": ("1000.0(0)", "1e-300(0)")}, "lead V6 reaches 1.4e+303 mV"),
    "a gain of 0, which means unknown": ({"ecg": NORMAL, "edit": ("1000.0(0)/mV", "0/mV")}, "the gain of lead I"),
    "a gain without a unit, which means mV": ({"ecg": NORMAL, "edit": ("1000.0(0)/mV", "1000.0(0)")}, (12, 12)),
    "neither gain nor unit": ({"ecg": NORMAL, "edit": ("1000.0(0)/mV 16 0 ", "")}, "the gain of lead I"),
    ".dat empty": ({"ecg": NORMAL, "cut": lambda _: b""}, "unreadable"),
    ".dat truncated": ({"ecg": NORMAL, "cut": lambda data: data[:70000]}, "unreadable"),
    ".dat with one bit changed": ({"ecg": NORMAL, "cut": lambda data: data[:5000] + bytes([data[5000] ^ 1])
                                   + data[5001:]}, "do not add up to their checksum"),
    "header empty": ({"ecg": NORMAL, "edit": ("",)}, "unreadable header"),
    "header of no signals": ({"ecg": NORMAL, "edit": ("x 0 500 5000\n",)}, "no signal"),
    "header of bytes": ({"ecg": NORMAL, "edit": ("".join(map(chr, range(14, 128))),)}, "unreadable header"),
    "header of 2 GB": ({"ecg": NORMAL, "edit": (" 500 5000", " 500 2147483648")}, "s long, expected 10"),
    "frames of 10^8 samples": ({"ecg": NORMAL, "edit": (".dat 16 ", ".dat 16x99999999 ")}, "more than 500 samples")}


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """RECORDS in fold 10 and three ordinary ones, prepared: (data folder, names by ecg_id - 1, what was printed)."""
    folder = tmp_path_factory.mktemp("records")
    records = {**{name: arguments for name, (arguments, _) in RECORDS.items()},
               **{f"ordinary {number}": {"ecg": NORMAL} for number in range(3)}}
    table = []
    (folder / "records500").mkdir()
    for ecg_id, (name, arguments) in enumerate(records.items(), 1):
        path = folder / "records500" / f"{ecg_id:05d}_hr"
        write(path, **arguments)
        fold = {"ordinary 0": 1, "ordinary 1": 9, "ordinary 2": 9}.get(name, 10)
        code = "IMI" if ecg_id % 2 else "NORM"
        table.append({"ecg_id": ecg_id, "scp_codes": str({"NORM" if fold == 1 else code: 100.0}), "strat_fold": fold,
                      "filename_lr": "", "filename_hr": f"records500/{path.name}"})
    pd.DataFrame(table).to_csv(folder / "ptbxl_database.csv", index=False)
    (folder / "scp_statements.csv").write_text(",diagnostic,diagnostic_class\nNORM,1.0,NORM\nIMI,1.0,MI\n")
    done = run_script("preprocess.py", "--ptbxl_path", folder, "--data_path", folder / "data", "--workers", 1)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return folder / "data", list(records), done.stdout


@pytest.mark.parametrize("name", RECORDS)
def test_record(audited, name):
    """Scored with finite numbers and counted, or refused by name in the audit; never dropped without a word."""
    data, names, printed = audited
    ecg_id, expected = names.index(name) + 1, RECORDS[name][1]
    records = arrays.open_records(data, "test", 12)
    table, manifest = arrays.load_table(data, "test", records), arrays.load_manifest(data)
    lost = {loss["ecg_id"]: loss["reason"] for loss in manifest["lost"]}
    assert (ecg_id in lost) != (ecg_id in table["ecg_id"])
    if isinstance(expected, str):
        assert expected in lost[ecg_id] and f"lost: record {ecg_id} (test): {lost[ecg_id]}" in printed
        return
    row, = np.flatnonzero(table["ecg_id"] == ecg_id)
    if name in SAME:
        np.testing.assert_allclose(records.read([row]), records.read([0]), atol=0.005)
    for protocol in PROTOCOLS.values():
        r_peaks = arrays.load_r_peaks(data, "test", records, protocol.detector)
        assert protocol.detector == "slope" or expected[0] <= len(r_peaks[row]) <= expected[1]
        found = Scorer(make_model(), protocol).score(records, r_peaks, [row], with_maps=True, beats_per_record=1)
        assert np.isfinite(found.scores).all() and np.isfinite(found.maps).all()
