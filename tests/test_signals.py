"""What happens to a signal before it is a row of an array: reading PTB-XL's records, resampling, filter, min-max."""
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import wfdb
from conftest import ROOT
from scipy.signal import butter, filtfilt

from dataloader import Normalisation
from ecg import signals
from ecg.signals import LEAD_NAMES, RecordError
from ecg.wfdb_files import read_record

with warnings.catch_warnings():
    warnings.simplefilter("ignore")     # pkg_resources, at HeartPy's import
    from heartpy.filtering import filter_signal

BEATS = np.arange(0.5, 9.9, 0.8) + 0.02 * np.sin(np.arange(12))     # s; HeartPy refuses rhythms without variability


def make_ecg(rate=500, seconds=10):
    """(samples, 12) mV: P, QRS and T as Gaussians around BEATS, another amplitude and offset in every lead."""
    time = np.arange(int(seconds * rate)) / rate
    wave = sum(height * np.exp(-0.5 * ((time - BEATS[:, None] - centre) / width) ** 2).sum(axis=0) for
               height, centre, width in ((0.1, -0.16, 0.025), (1.0, 0, 0.012), (-0.2, 0.03, 0.012), (0.08, 0.25, 0.05)))
    return wave[:, None] * np.linspace(0.5, 1.6, 12) + np.linspace(-0.2, 0.2, 12)


def write_record(folder, signal, leads=LEAD_NAMES, rate=500, unit="mV", gain=1000.0, baseline=0):
    """Write a WFDB record as PTB-XL's are, format 16; returns its path without extension."""
    number = signal.shape[1]
    wfdb.wrsamp("record", fs=rate, units=[unit] * number, sig_name=list(leads), p_signal=signal, fmt=["16"] * number,
                adc_gain=[gain] * number, baseline=[baseline] * number, write_dir=str(folder))
    return Path(folder) / "record"


@pytest.fixture
def noise():
    return np.cumsum(np.random.default_rng(0).normal(size=(5000, 12)), axis=0) / 100


def test_filter_is_the_published_one(noise):
    """High-pass 1 Hz, then low-pass 25 Hz, order 2, zero phase, lead by lead; HeartPy's "notch" changes nothing."""
    filtered = signals.filter_leads(noise)
    for lead in range(12):
        high = filtfilt(*butter(2, 1 / 250, "highpass"), noise[:, lead])
        low = filtfilt(*butter(2, 25 / 250, "lowpass"), high)
        np.testing.assert_allclose(filtered[:, lead], low, rtol=0, atol=1e-12)
        high = filter_signal(noise[:, lead], cutoff=1, sample_rate=500, order=2, filtertype="highpass")
        low = filter_signal(high, cutoff=25, sample_rate=500, order=2, filtertype="lowpass")
        np.testing.assert_allclose(filtered[:, lead], low, rtol=0, atol=1e-12)
        np.testing.assert_allclose(filter_signal(low, cutoff=35, sample_rate=500, filtertype="notch"), low,
                                   rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_normalisation_fills_the_range_and_survives_flat_leads(noise, dtype):
    """Each lead spans exactly [-1, 1], upright; a flat one becomes 0; twice is once, and the network's is the same."""
    noise[:, 4], noise[:, 7] = 0.3, 0
    normal = signals.normalize_leads(noise.astype(dtype))
    moving = np.setdiff1d(np.arange(12), [4, 7])
    assert normal.dtype == dtype and (normal[:, [4, 7]] == 0).all()
    columns = np.arange(len(moving))
    assert (normal[:, moving][noise[:, moving].argmin(axis=0), columns] == -1).all()
    assert (normal[:, moving][noise[:, moving].argmax(axis=0), columns] == 1).all()
    np.testing.assert_allclose(signals.normalize_leads(normal), normal, rtol=0, atol=1e-6)
    by_network = Normalisation().normalise(torch.from_numpy(noise.astype(dtype))[None])[0].numpy()
    np.testing.assert_allclose(normal, by_network, rtol=0, atol=1e-6)


@pytest.mark.parametrize("peak", [0.05, 0.5, 3.33, 9.9])
def test_resampling_keeps_time(peak):
    """A peak at t seconds of a 100 Hz record is at t seconds at 500 Hz, and the record is 5000 samples long."""
    bump = np.exp(-0.5 * ((np.arange(1000) / 100 - peak) / 0.03) ** 2)
    resampled = signals.resample(np.stack([bump, 2 * bump], axis=1), 100)
    assert resampled.shape == (5000, 2)
    assert (np.abs(resampled.argmax(axis=0) - 500 * peak) <= 1).all()
    np.testing.assert_allclose(resampled.max(axis=0), [1, 2], rtol=0.02)
    assert np.array_equal(signals.resample(resampled, 500), resampled)


def test_resampling_does_not_ring_at_the_ends():
    """A lead with an offset and a drift comes back as the same line, also at both ends; a flat lead stays flat."""
    line = np.linspace(4, 6, 1000)
    expected = np.interp(np.arange(5000) / 500, np.arange(1000) / 100, line)
    read = signals.resample(np.stack([line, np.full(1000, 0.3)], axis=1), 100)
    np.testing.assert_allclose(read[:, 0], expected, atol=0.02)
    assert (read[:, 1] == 0.3).all()


def test_amplitudes_are_doubted_by_the_median_lead():
    """One lead that is off, or flat ones, do not make a record doubtful; 50 mV and 0.02 mV are the limits."""
    ecg = make_ecg()[None]
    for factor, words in ((1, ""), (100, "uV that are called mV"), (0.01, "called uV")):
        said = signals.doubt_height(signals.median_height(ecg * factor))
        assert words in said and bool(said) == bool(words)
    assert not signals.doubt_height(signals.median_height(ecg * ([0] * 6 + [1] * 5 + [1000])))
    assert not signals.doubt_height(signals.median_height(0 * ecg))


# ---- reading PTB-XL's and LUDB's records

@pytest.mark.parametrize("unit, scale, gain, baseline", [
    ("mV", 1, 1000.0, 0), ("mV", 1, 200.0, 150), ("UV", 1000, 5.0, -20)])
def test_a_record_is_read_in_mv(tmp_path, unit, scale, gain, baseline):
    """Leads are found by name, in any order and case, others are ignored; any gain, baseline and unit become mV."""
    order = [12, *np.random.default_rng(1).permutation(12)]
    signal = np.insert(make_ecg(), 12, 0.003, axis=1)[:, order] * scale
    path = write_record(tmp_path, signal, [(*LEAD_NAMES, "MCG")[lead].upper() for lead in order], 500, unit, gain,
                        baseline)
    np.testing.assert_allclose(read_record(path, 500), make_ecg(), atol=0.003)


def test_100_hz_record_keeps_its_place_in_time(tmp_path):
    """The small download gives (5000, 12) too, with every R wave where the 500 Hz record has it."""
    low = read_record(write_record(tmp_path, make_ecg(100), rate=100), 100)
    assert low.shape == (5000, 12)
    for beat in BEATS:
        around = slice(int(beat * 500) - 100, int(beat * 500) + 100)
        assert (np.abs(low[around].argmax(axis=0) - make_ecg()[around].argmax(axis=0)) <= 2).all()


def damaged(name, folder):
    """Write a record with this fault."""
    ecg = make_ecg()
    ecg[1234, 3] = np.nan if name == "sample" else 0    # written as WFDB's missing value, -32768
    path = write_record(folder, {"length": ecg[:4500], "lead": ecg[:, :11]}.get(name, ecg),
                        LEAD_NAMES[:11] if name == "lead" else LEAD_NAMES, 250 if name == "rate" else 500,
                        "mmHg" if name == "unit" else "mV")
    header, data = path.with_suffix(".hea"), path.with_suffix(".dat")
    if name == "truncated":
        data.write_bytes(data.read_bytes()[:50001])
    if name == "checksum":
        data.write_bytes(b"\x01" + data.read_bytes()[1:])
    if name == "data":
        data.unlink()
    if name == "header":
        header.write_bytes(bytes(range(256)))
    if name == "names":
        header.write_text(header.read_text().replace(" aVR", ""))
    if name == "signals":
        header.write_text("record 0 500 5000\n")


@pytest.mark.parametrize("name, reason", [
    ("lead", r"no lead V6$"), ("sample", r"missing samples in lead aVR, .* 2.468 s"), ("length", r"^9 s long"),
    ("rate", r"250 Hz, expected 500"), ("unit", r"lead I is in 'mmHg'"), ("truncated", r"unreadable samples"),
    ("checksum", "lead I do not add up"), ("data", r"signal file .*record.dat is missing"),
    ("header", r"unreadable header"), ("names", r"no lead aVR|unreadable|derived"), ("signals", r"no signal")])
def test_unusable_records_say_why(tmp_path, name, reason):
    """Whatever is wrong with a record, it is a RecordError whose one-line reason names the thing, for the audit."""
    damaged(name, tmp_path)
    if name == "names":                 # a limb lead that is absent follows from the others
        np.testing.assert_allclose(read_record(tmp_path / "record", 500)[:, 3], -make_ecg()[:, :2].sum(axis=1) / 2,
                                   atol=0.002)
        return
    with pytest.raises(RecordError, match=reason) as caught:
        read_record(tmp_path / "record", 500)
    assert "\n" not in str(caught.value)


def test_wfdb_and_heartpy_are_imported_late():
    """Training and scoring on prepared arrays run on a machine that has neither."""
    code = "import sys, ecg.arrays, ecg.ludb; sys.exit(bool({'wfdb', 'heartpy', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
