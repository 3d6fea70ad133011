"""Files of one's own: read is what was written, in the forms that people and devices write; the rest is refused."""
import tracemalloc

import numpy as np
import pytest
from small import beats_at, every, write_wfdb

from ecg import csv_files, recording_files, signals, wfdb_files
from ecg.recording_files import describe_flat, find_flat, open_recording, windows_of
from ecg.signals import LEAD_NAMES, RecordError

NAMES, ROW = ",".join(LEAD_NAMES), ",".join(["0.1"] * 12)
EIGHT = [0, 1, *range(6, 12)]           # I, II, V1 to V6


def make_ecg(rate=500, duration=10):
    """(samples, 12) mV; the same signal at every rate. The limb leads fit."""
    times = every(0.8, 0.5, 90)
    leads = beats_at(times, rate, 0.015, duration) + 0.2 * beats_at(times + 0.25, rate, 0.05, duration)
    one, two = leads[:, 0], leads[:, 1]
    leads[:, 2:6] = np.stack([two - one, -(one + two) / 2, one - two / 2, two - one / 2], axis=1)
    return leads


def write_csv(folder, signal, header=NAMES, comments=(), times=None, separator=",", name="own.csv"):
    """A CSV file; times is a first column of text."""
    lines = [separator.join(f"{value:.6g}" for value in row) for row in signal]
    if separator != ",":
        lines = [line.replace(".", ",") for line in lines]
    if times is not None:
        lines = [f"{time}{separator}{line}" for time, line in zip(times, lines)]
    path = folder / name
    path.write_text("\n".join((*comments, header, *lines)) + "\n", encoding="utf-8")
    return path


def read(path, *stated):
    """(the first 10 s, (5000, 12) mV at 500 Hz; notes) of a file."""
    recording = open_recording(path, *stated)
    _, first = next(windows_of(recording))
    return first, recording.notes


def edit(path, *replacements):
    header = path.with_suffix(".hea")
    text = header.read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    header.write_text(text, encoding="utf-8")


# ---- WFDB

@pytest.mark.parametrize("rate", [128, 257, 333.5, 1000])
def test_any_rate(tmp_path, rate):
    """Whatever the rate, also one that shares no factor with 500, the signal lies at the same times."""
    np.testing.assert_allclose(read(write_wfdb(tmp_path / "record", make_ecg(rate), rate))[0], make_ecg(), atol=0.01)


@pytest.mark.parametrize("unit, factor, extension", [("mV", 1, ""), ("uV", 1000, ".hea"), ("µV", 1000, ".dat"),
                                                     ("μV", 1000, ".mat"), ("", 1, "")])
def test_leads_units_and_gain(tmp_path, unit, factor, extension):
    """Leads in another order and case, any unit (none is mV, WFDB's default) and gain; the record by any of its files.

    Of more signals the twelve are taken and the others named (PTBDB has vx, vy, vz).
    """
    order = [7, 3, 1, 0, 2, 11, 10, 9, 8, 6, 5, 4]
    signal = np.column_stack([make_ecg()[:, order] * factor, np.zeros((5000, 3))])
    names = [LEAD_NAMES[place].lower() for place in order] + ["vx", "vy", "vz"]
    path = write_wfdb(tmp_path / "record", signal, 500, names, "uV", 613 / factor)
    edit(path, ("/uV", f"/{unit}" * bool(unit)))
    first, notes = read(f"{path}{extension}")
    np.testing.assert_allclose(first, make_ecg(), atol=0.002)
    assert notes == ["not one of the twelve leads, left out: vx, vy, vz"]
    header = path.with_suffix(".hea")
    header.write_bytes(header.read_bytes().replace("µ".encode(), b"\xb5"))              # in Latin-1
    np.testing.assert_array_equal(read(path)[0], first)


@pytest.mark.parametrize("style", ["Lead {}", "ECG {}", "lead_{}", "MDC_ECG_LEAD_{}", "ECG Lead {}"])
def test_names_as_people_write_them(tmp_path, style):
    names = [style.format(lead.upper()).replace(" V", " C") for lead in LEAD_NAMES]
    np.testing.assert_allclose(read(write_wfdb(tmp_path / "record", make_ecg(), 500, names))[0], make_ecg(), atol=0.002)


@pytest.mark.parametrize("kept", [EIGHT, [1, 2, *range(6, 12)], [0, 2, 4, *range(6, 12)]])
def test_limb_leads_follow_from_two(tmp_path, kept):
    """III = II - I, aVR = -(I + II)/2, aVL = I - II/2, aVF = II - I/2; which ones were derived is said."""
    names = [LEAD_NAMES[lead] for lead in kept]
    first, notes = read(write_wfdb(tmp_path / "record", make_ecg()[:, kept], 500, names))
    np.testing.assert_allclose(first, make_ecg(), atol=0.002)
    assert notes == [", ".join(lead for lead in LEAD_NAMES if lead not in names) + " derived from the other limb leads"]
    path = write_csv(tmp_path, make_ecg()[:, kept] * 1000, ",".join(names), ("# fs: 500 Hz", "# unit: uV"))
    np.testing.assert_allclose(read(path)[0], make_ecg(), atol=0.002)


@pytest.mark.parametrize("old, new, message", [
    ("record 12 500 5000", "record 12", "its sampling rate is not stated; give --record_rate"),
    ("record 12 500 5000", "record 12 50 5000", "50 Hz, not 100"),
    ("1000.0(0)/mV", "0/mV", "does not state the gain of lead I;"),
    ("/mV", "/V", "lead I is in 'V'"), ("/mV", "/mmHg", "lead I is in 'mmHg'"), ("0 V3", "0 V7", "no lead V3;"),
    ("0 aVR", "0 avl", "more than one lead aVL"), ("record 12", "no header", "unreadable header"),
    ("record 12 500 5000", "record 12 500 6000", "unreadable samples")])
def test_wfdb_refusals(tmp_path, old, new, message):
    """What a header does not state (wfdb fills in 250 Hz and a gain of 200) or the program does not know."""
    path = write_wfdb(tmp_path / "record", make_ecg())
    edit(path, (old, new))
    with pytest.raises(RecordError) as caught:
        read(path)
    assert message in f"{caught.value}; {caught.value.remedy}" and "\n" not in str(caught.value)


def test_files_that_are_missing(tmp_path, monkeypatch):
    """The path is the one that the user would type, from wherever the program is called."""
    (tmp_path / "sub").mkdir()
    path = write_wfdb(tmp_path / "sub" / "record", make_ecg())
    path.with_suffix(".dat").unlink()
    monkeypatch.chdir(tmp_path)
    for named, missing in (("sub/record.hea", "sub/record.dat is missing"), ("sub/none", "sub/none.hea is missing"),
                           ("sub/none.mat", "sub/none.hea is missing"), ("none.csv", "no such file"),
                           ("sub", "neither")):
        with pytest.raises(RecordError, match=missing):
            read(named)


def test_samples_that_are_missing_or_damaged(tmp_path):
    """A lead and its second are named; what does not add up to its checksum is refused, however long the record."""
    signal = make_ecg(500, 20)
    signal[5007, 3] = np.nan
    with pytest.raises(RecordError, match="missing samples in lead aVR, the first at 10.014 s"):
        list(windows_of(open_recording(write_wfdb(tmp_path / "record", signal))))
    path = write_wfdb(tmp_path / "record", make_ecg(500, 20))
    content = path.with_suffix(".dat").read_bytes()
    path.with_suffix(".dat").write_bytes(content[:-24] + b"\x01" + content[-23:])
    with pytest.raises(RecordError, match="lead I do not add up to their checksum"):
        list(windows_of(open_recording(path)))
    with pytest.raises(RecordError, match="500 Hz by its header and 250 Hz by --record_rate"):
        open_recording(path, 250.0)


def test_challenge_records(tmp_path):
    """PhysioNet Challenge 2020 and 2021: format 16x1+24, samples behind the 24 bytes of a .mat file's head."""
    path = write_wfdb(tmp_path / "A0001", make_ecg())
    data = path.with_suffix(".dat")
    data.with_suffix(".mat").write_bytes(bytes(24) + data.read_bytes())
    data.unlink()
    edit(path, ("A0001.dat 16 ", "A0001.mat 16x1+24 "))
    header = path.with_suffix(".hea")
    header.write_text(header.read_text().replace("500 5000", "500 5000 12-May-2020 12:33:59") + "#Age: 74\n")
    for named in ("A0001", "A0001.hea", "A0001.mat"):
        np.testing.assert_allclose(read(tmp_path / named)[0], make_ecg(), atol=0.001)


# ---- CSV

UNITS = ",".join(f" {lead.upper()} [µV]" if place % 2 else f"{lead}(mv)" for place, lead in enumerate(LEAD_NAMES))
MIXED = np.tile([1, 1000], 6)


@pytest.mark.parametrize("header, comments, factor", [
    (NAMES, ("# rate: 250 Hz", "# unit: mV", "# by us"), 1), (NAMES, ("# fs: 250 Hz", "# units = mV"), 1),
    (UNITS, ("# Sampling frequency: 250",), MIXED), (NAMES, ("Sample Rate,250 hertz", "Unit,µV", "Name,A B"), 1000),
    ("# " + NAMES, ("# fs=0.25 kHz", "# unit=uV"), 1000), (",".join(f"{lead}_uV" for lead in LEAD_NAMES),
                                                           ("#fs: 250 samples/s",), 1000),
    (",".join(f'"ECG Lead {lead} (mV)"' for lead in LEAD_NAMES), ("# sfreq: 250.0 Hz", "# device: X, 12 leads"), 1)])
def test_rate_and_unit_of_csv(tmp_path, header, comments, factor):
    """From comments or lines above the names, with # or without, and from the names; each in many spellings."""
    path = write_csv(tmp_path, make_ecg(250) * factor, header, comments)
    np.testing.assert_allclose(read(path)[0], make_ecg(), atol=0.005)
    content = path.read_bytes().replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + content + b"\r\n\r\n")                   # Windows: BOM, CRLF, empty lines
    np.testing.assert_allclose(read(path, 250)[0], make_ecg(), atol=0.005)
    for encoding in ("utf-16", "latin-1"):
        path.write_bytes(content.decode().encode(encoding))
        np.testing.assert_allclose(read(path)[0], make_ecg(), atol=0.005)


@pytest.mark.parametrize("rate, unit, digits", [(250, "s", 3), (257, "s", 3), (128.5, "s", 5), (500, "ms", 0),
                                                (360, "ms", 1), (1000, "us", 0)])
def test_rate_from_times(tmp_path, rate, unit, digits):
    """A column of times in s, ms or us, rounded as devices round them; it may start anywhere."""
    factor = {"s": 1, "ms": 1e3, "us": 1e6}[unit]
    times = [f"{factor * (5 + sample / rate):.{digits}f}" for sample in range(round(12 * rate))]
    path = write_csv(tmp_path, make_ecg(rate, 12), f"Time [{unit}],{NAMES}", ("# unit: mV",), times)
    assert open_recording(path).rate == rate
    np.testing.assert_allclose(read(path)[0], make_ecg(), atol=0.01)


def test_exports_of_devices(tmp_path):
    """Semicolons with decimal commas (MUSE and others in Europe), tabs, an index column, a name for each lead."""
    for separator in (";", "\t"):
        path = write_csv(tmp_path, make_ecg(500) * 1000, separator.join(["Time (ms)", *LEAD_NAMES]),
                         ("Sample rate;500 Hz", "Unit;uV"), [f"{2 * sample},0" for sample in range(5000)], separator)
        first, notes = read(path)
        np.testing.assert_allclose(first, make_ecg(), atol=0.002)
        assert notes == []
    path = write_csv(tmp_path, np.c_[make_ecg(), np.zeros(5000)], f",{NAMES},Note", (), range(5000))   # of pandas
    first, notes = read(path, 500.0, "mV")
    np.testing.assert_allclose(first, make_ecg(), atol=0.002)
    assert notes == ["not one of the twelve leads, left out: Note"]
    path = write_csv(tmp_path, make_ecg() * 1000)           # of Chapman and Shaoxing: neither unit nor rate
    np.testing.assert_allclose(read(path, 500.0, "uV")[0], make_ecg(), atol=0.002)


GOOD = ["# rate: 250 Hz", "# unit: mV", NAMES, *[ROW] * 2500]


def changed(place, line):
    """GOOD with another line, or without it."""
    return [*GOOD[:place], *([] if line is None else [line]), *GOOD[place + 1:]]


def timed(*times, head=GOOD[:2]):
    return [*head, f"time,{NAMES}", *(f"{time},{ROW}" for time in times)]


@pytest.mark.parametrize("lines, message", [
    (GOOD[:9], "0.024 s long"), (changed(0, None), "sampling rate is not stated; give --record_rate"),
    (changed(0, "# rate: fast"), "rate is stated as 'fast'"), (changed(0, "# rate: 30 Hz"), "30 Hz, not 100"),
    (["# rate: 500 Hz", *GOOD], "line 2 states the rate again"),
    (changed(1, None), "unit of lead I is not stated; give --record_unit, name the column 'I [mV]'"),
    (changed(1, "# unit: V"), "lead I is in 'V'"), (changed(2, NAMES.replace("V6", "V7")), "no lead V6"),
    (changed(2, NAMES.replace("V6", "V6 [uV]")), "lead V6 is in mV and in uV"),
    (changed(2, NAMES.replace("V6", "v5")), "more than one lead V5"),
    ([], "names the leads"), (changed(2, ROW), "names the leads"), (GOOD[:3], "no samples"),
    (changed(2, f"t [h],{NAMES}"), "times are in 'h'"), (changed(1004, ROW + ",1"), "13 values in line 1005 for 12"),
    (changed(1004, ""), "nothing in line 1005"), (changed(4, ROW[:-3] + "nan"), "'nan' in line 5, column V6"),
    (changed(4, ROW[:-3] + "1,2"), "13 values in line 5"), (changed(4, "," + ROW[4:]), "'' in line 5, column I,"),
    (changed(4, "1_0" + ROW[3:]), "'1_0' in line 5"), (changed(4, ROW[:-3] + "1e999"), "'1e999' in line 5"),
    (changed(4, ROW[:-3] + "1e9"), "lead V6 reaches 1e+09 mV"), (timed(0, 0.004, 0.012), "line 6 is off by 1 samples"),
    (timed(0, 0.002, 0.004), "250 Hz, line 5 is off by"), (timed(0, 4, 8, head=GOOD[1:2]), "0.25 Hz, not 100"),
    (timed(1, 1, 1, head=GOOD[1:2]), "times do not increase"),
    (timed("00:00:01", 2), "'00:00:01' in line 4, column time")])
def test_csv_refusals(tmp_path, lines, message):
    """One sentence names the line or column, and the remedy; nothing is guessed."""
    path = tmp_path / "own.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(RecordError) as caught:
        list(windows_of(open_recording(path)))
    assert message in f"{caught.value}; {caught.value.remedy}" and "\n" not in str(caught.value)


# ---- windows

@pytest.mark.parametrize("rate, form", [(250, "wfdb"), (257, "wfdb"), (360, "csv")])
def test_windows_do_not_depend_on_the_blocks(tmp_path, monkeypatch, rate, form):
    """85 s become nine windows, the last one at the end; read in small blocks they are what the whole signal gives."""
    signal = make_ecg(rate, 85)
    path = (write_wfdb(tmp_path / "record", signal, rate) if form == "wfdb" else
            write_csv(tmp_path, signal, f"time,{NAMES}", ("# unit: mV",), np.arange(len(signal)) / rate))
    monkeypatch.setattr(wfdb_files, "SAMPLES_AT_ONCE", 999)
    monkeypatch.setattr(csv_files, "LINES_AT_ONCE", 999)
    windows = list(windows_of(open_recording(path)))
    assert [start for start, _ in windows] == [*range(0, 40_000, 5000), 37_500]
    whole = signals.resample(signal, rate)
    for start, window in windows:
        np.testing.assert_allclose(window, whole[start:start + 5000], atol=0.002)


def test_a_jump_of_times_between_blocks_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "LINES_AT_ONCE", 500)
    times = np.arange(5000) / 500 + 0.002 * (np.arange(5000) >= 3000)
    path = write_csv(tmp_path, make_ecg(), f"time,{NAMES}", ("# unit: mV",), times)
    with pytest.raises(RecordError, match="line 3003 is off by 1 samples"):
        list(windows_of(open_recording(path)))


def test_memory_does_not_grow_with_length(tmp_path, monkeypatch):
    """Twelve times the length, the same peak."""
    monkeypatch.setattr(wfdb_files, "SAMPLES_AT_ONCE", 5000)
    peaks = []
    for repeats in (3, 36):
        path = write_wfdb(tmp_path / "record", np.tile(make_ecg(250, 40), (repeats, 1)), 250)
        tracemalloc.start()
        assert sum(1 for _ in windows_of(open_recording(path))) == 4 * repeats
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("samples, rate, note", [
    (4999, 500, "2 ms short of 10 s, padded with its last value"), (4995, 500, "10 ms short"), (4994, 500, None),
    (999, 100, "10 ms short"), (998, 100, None)])
def test_up_to_10_ms_may_lack(tmp_path, samples, rate, note):
    path = write_wfdb(tmp_path / "record", make_ecg(rate)[:samples] + 0.25, rate)
    if note is None:
        with pytest.raises(RecordError, match="10 s is the least"):
            read(path)
        return
    first, notes = read(path)
    assert first.shape == (5000, 12) and note in notes[0] and (first[-1] == first[-2]).all()
    np.testing.assert_allclose(first[:4990], make_ecg()[:4990] + 0.25, atol=0.01)


@pytest.mark.parametrize("leads, start, end, text", [
    (slice(None), 2, 6, "all leads 2-6"), ([6], 0, 10, "V1 0-10"), ([1, 2], 7.5, 10, "II, III 7.5-10"),
    ([3], 4, 5, ""), ([], 0, 0, "")])
def test_electrodes_without_contact(leads, start, end, text):
    """A lead that is flat for 2 s, at any offset and with a little noise, is named with its seconds, in any unit."""
    window = make_ecg() + 0.02 * np.random.default_rng(0).normal(size=(5000, 12)) + 2
    quiet = slice(int(500 * start), int(500 * end))
    window[quiet, leads] = -4 + 0.0005 * np.random.default_rng(1).normal(size=window[quiet, leads].shape)
    for factor in (1, 0.001):
        spans = {lead: [(round(begin, 1), round(stop, 1)) for begin, stop in of_lead]
                 for lead, of_lead in find_flat(window * factor).items()}
        assert describe_flat(spans) == text
    assert set(find_flat(np.zeros((5000, 12)))) == set(LEAD_NAMES) and recording_files.FLAT_FOR == 1000
