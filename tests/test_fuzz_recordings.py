"""A thousand damaged recordings and checkpoints that test.py is given by name, and recordings of any form that is read.

Each is accepted with finite content or refused by name; what must be accepted is, and reads as the same millivolts.
"""
import numpy as np
import pytest
import torch
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fuzz import NASTY, bytes_of, ecg_like, mutate, outcome, properties, tell

from scoring import percentiles
from ecg import signals
import test as script
from model import MCF, load_checkpoint, weights_are_finite
from ecg.recording_files import read_recording
from ecg.signals import LEAD_NAMES
from utils import UserError

WORDS = (*NASTY, "I", "v6", "aVR [mV]", "II [uV]", "time", "t", "# rate: 250 Hz", "# unit: uV", "# rate: 1e3 Hz", "#",
         '"', "0.1", "1 000", "0x10", "1_0", "\u0661", "-0", "1e5", "1e7", "\r", "\ufeff", "mV", "[", ")")


def fuzz(folder, name, cases, change, what):
    """Read each case as --record does; change(rng) gives its files {name: bytes}. Returns the counts, printed too."""
    counts = {"accepted": 0, "refused": 0}
    for case in range(cases):
        for file, content in change(np.random.default_rng(case)).items():
            (folder / file).write_bytes(content)
        with outcome(counts, (case, what)):
            found = read_recording(folder / name, None)
            assert found.shape[1] == 12 and len(found) >= 5000 and np.isfinite(found).all()
    assert sum(counts.values()) == cases
    return tell(counts, what)


@pytest.fixture(scope="module")
def wfdb_bytes(tmp_path_factory):
    """A sound header and its samples, 10 s at 100 Hz."""
    folder = tmp_path_factory.mktemp("wfdb")
    write_wfdb(folder, ecg_like(), 100, LEAD_NAMES, "mV", 1000.0)
    return (folder / "record.hea").read_bytes(), (folder / "record.dat").read_bytes()


def write_wfdb(folder, signal, rate, names, unit, gain):
    """record.hea and record.dat of (samples, 12) in this unit."""
    wfdb.wrsamp("record", fs=rate, units=[unit] * 12, sig_name=list(names), p_signal=signal, fmt=["16"] * 12,
                adc_gain=[gain] * 12, baseline=[0] * 12, write_dir=str(folder))


def test_400_headers_of_ones_own(tmp_path, wfdb_bytes):
    """--record on a header with any field damaged: no rate, length, gain or unit is made up."""
    header, data = wfdb_bytes
    counts = fuzz(tmp_path, "record", 400, lambda rng: {"record.hea": mutate(rng, header), "record.dat": data},
                  "headers given as --record")
    assert min(counts.values()) > 10


def test_100_sample_files_of_ones_own(tmp_path, wfdb_bytes):
    """--record on a .dat that is not the header's: the checksum or the length tells."""
    header, data = wfdb_bytes
    counts = fuzz(tmp_path, "record.hea", 100, lambda rng: {"record.hea": header, "record.dat": mutate(rng, data)},
                  ".dat files given as --record")
    assert counts["accepted"] < 5               # changes that leave every lead's sum as it was


@pytest.mark.parametrize("part, lines", [("the head", 4), ("all lines", 1102)])
def test_200_csv_files(tmp_path, part, lines):
    """--record on a .csv file, damaged in its comments, names, units and first samples, or anywhere."""
    rows = "\n".join(",".join(f"{value:.3f}" for value in row) for row in np.resize(ecg_like(), (1100, 12)))
    whole = f"# rate: 100 Hz\n{','.join(f'{lead} [mV]' for lead in LEAD_NAMES)}\n{rows}\n".encode().split(b"\n")

    def change(rng):
        separator = (b",", b" ", b"\n")[rng.integers(3)]
        return {"own.csv": b"\n".join((mutate(rng, b"\n".join(whole[:lines]), WORDS, separator), *whole[lines:]))}
    counts = fuzz(tmp_path, "own.csv", 200, change, f".csv files given as --record, {part} damaged")
    assert min(counts.values()) > 5


def test_100_checkpoints(tmp_path):
    """.pt files with bytes changed in the pickle, the directory or anywhere: whole and finite weights, or refused."""
    torch.manual_seed(0)
    state = {name: value.half() if value.is_floating_point() else value
             for name, value in MCF(hidden=2).state_dict().items()}
    whole = bytes_of(lambda file: torch.save({
        "model_state_dict": state, "epoch": 2, "config": {"protocol": "clean", "select": "val", "epochs": 3,
                                                          "mask_ratio": 30},
        "history": [{"epoch": 1, "loss": 0.5}], "fold9_normals": {"paper": [0.5, 1.0], "clean": [0.25, 1.0]}}, file))
    start = whole.index(b"model_state_dict")                # in the pickle, which the weights follow
    regions = ((start, start + 12000), (len(whole) - 9000, len(whole)), (0, len(whole)))
    counts = {"accepted": 0, "refused": 0}
    for case in range(100):
        rng, damaged = np.random.default_rng(case), bytearray(whole)
        low, high = regions[case % 3]
        for place in rng.integers(low, high, rng.integers(1, 4)):
            damaged[place:place + 1] = rng.bytes(int(rng.integers(0, 3)) if case % 2 else 1)
        (tmp_path / "model.pt").write_bytes(damaged[:rng.integers(len(damaged))] if case % 10 == 0 else damaged)
        with outcome(counts, case):
            model, facts = load_checkpoint(tmp_path / "model.pt")
            assert weights_are_finite(model) and set(script.known_facts(facts)) == {"epoch", "config", "history"}
            normals, _ = percentiles.read_normals(tmp_path / "model.pt", facts, 30)
            assert all(np.isfinite(scores).all() for scores in normals.values())
    assert min(tell(counts, "checkpoints").values()) > 5


# ---- properties: what must be accepted

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose files each example replaces."""
    return tmp_path_factory.mktemp("properties")


ORDERS = st.permutations(range(12))
CASES = st.lists(st.sampled_from([str, str.upper, str.lower, str.swapcase]), min_size=12, max_size=12)
UNITS = st.sampled_from([("mV", 1), ("uV", 1000), ("MV", 1), ("UV", 1000)])
MISSING = st.none() | st.integers(0, 11)


def check_read(read, expected, within, refusal):
    """Read as expected, (samples, 12) in mV, or refused with these words where there are any."""
    if refusal:
        with pytest.raises((UserError, signals.RecordError), match=refusal):
            read()
    else:
        np.testing.assert_allclose(read(), expected, rtol=0, atol=within)


@settings(properties, max_examples=30)
@given(ORDERS, CASES, UNITS, st.floats(2, 4), st.sampled_from([5000, 5000, 4999, 5001, 7321]), MISSING)
def test_any_wfdb_form_reads_as_the_same_millivolts(folder, order, cases, unit, power, length, missing):
    """Leads in any order and case, any gain in any unit: from 10 s on it is read, to half a step of the converter.

    preprocess.py takes 10 s alone; a lead without samples is refused by name.
    """
    (unit, factor), expected = unit, np.resize(ecg_like(500), (length, 12))
    stored = expected * factor
    if missing is not None:
        stored[:, missing] = np.nan
    write_wfdb(folder, stored[:, order], 500, [change(LEAD_NAMES[lead]) for change, lead in zip(cases, order)], unit,
               10 ** power / factor)
    absent = None if missing is None else f"missing samples in lead {LEAD_NAMES[missing]}"
    within = 0.51 / 10 ** power
    check_read(lambda: read_recording(folder / "record", None), expected, within, absent or (
        "10 s is the least" if length < 5000 else None))
    check_read(lambda: signals.read_record(folder / "record", 500), expected, within, (
        "expected 10" if length != 5000 else absent))


@settings(properties, max_examples=25)
@given(ORDERS, CASES, UNITS, st.sampled_from([1000, 1000, 999, 1234]), MISSING, st.booleans(), st.booleans())
def test_any_csv_form_reads_as_the_same_millivolts(folder, order, cases, unit, length, missing, by_name, timed):
    """The same of .csv files, their unit in names or comment, their rate in a comment or a column of times."""
    (unit, factor), made = unit, np.resize(ecg_like(), (length, 12))
    stored = np.round(made * factor, 3)[:, order]
    names = [change(LEAD_NAMES[lead]) + f" [{unit}]" * by_name for change, lead in zip(cases, order)]
    rows = stored.astype(str)
    if missing is not None:
        rows[length // 2, order.index(missing)] = "nan"
    if timed:
        names, rows = ["time", *names], np.c_[np.char.mod("%.2f", np.arange(length) / 100), rows]
    head = [] if timed else ["# rate: 100 Hz"]
    text = [*head, *([] if by_name else [f"# unit: {unit}"]), ",".join(names), *map(",".join, rows.tolist())]
    (folder / "own.csv").write_text("\n".join(text) + "\n", encoding="utf-8")
    refusal = "10 s is the least" if length < 1000 else None
    if missing is not None:
        refusal = f"'nan' in line .*, column {LEAD_NAMES[missing].lower()}, where a number must be"
    check_read(lambda: read_recording(folder / "own.csv", None),
               signals.resample(stored[:, np.argsort(order)] / factor, 100), 1e-9, refusal)
