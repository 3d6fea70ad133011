"""What happens to a signal before it is a row of an array: reading, resampling, filter, normalisation, R peaks."""
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import wfdb
from scipy.signal import butter, filtfilt

import model
from ecg import signals
from ecg.signals import LEAD_NAMES, RecordError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")     # pkg_resources, at HeartPy's import
    import heartpy
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


def edit_header(path, *replacements):
    header = path.with_suffix(".hea")
    text = header.read_text()
    for old, new in replacements:
        text = text.replace(old, new)
    header.write_text(text, encoding="utf-8")


@pytest.fixture
def noise():
    return np.cumsum(np.random.default_rng(0).normal(size=(5000, 12)), axis=0) / 100


# ---- filter

def test_filter_is_two_zero_phase_passes_per_lead(noise):
    """The published band-pass: high-pass 1 Hz, then low-pass 25 Hz, order 2, lead by lead, no axis mixed up."""
    expected = np.empty_like(noise)
    for lead in range(12):
        high = filtfilt(*butter(2, 1 / 250, "highpass"), noise[:, lead])
        expected[:, lead] = filtfilt(*butter(2, 25 / 250, "lowpass"), high)
    np.testing.assert_allclose(signals.filter_leads(noise), expected, rtol=0, atol=1e-12)


def test_filter_is_heartpys(noise):
    """The published code filters by HeartPy, with a "notch" at 35 Hz besides, which changes nothing at 500 Hz."""
    filtered = signals.filter_leads(noise)
    for lead in range(12):
        high = filter_signal(noise[:, lead], cutoff=1, sample_rate=500, order=2, filtertype="highpass")
        low = filter_signal(high, cutoff=25, sample_rate=500, order=2, filtertype="lowpass")
        np.testing.assert_allclose(filtered[:, lead], low, rtol=0, atol=1e-12)
        np.testing.assert_allclose(filter_signal(low, cutoff=35, sample_rate=500, filtertype="notch"), low,
                                   rtol=0, atol=1e-9)


# ---- normalisation

@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_normalisation_fills_the_range_and_survives_flat_leads(noise, dtype):
    """Each lead spans exactly [-1, 1] on its own; a flat lead becomes 0, not NaN; the type is kept."""
    noise[:, 4], noise[:, 7] = 0.3, 0
    normal = signals.normalize_leads(noise.astype(dtype))
    moving = np.setdiff1d(np.arange(12), [4, 7])
    assert normal.dtype == dtype
    assert (normal[:, moving].min(axis=0) == -1).all() and (normal[:, moving].max(axis=0) == 1).all()
    assert (normal[:, [4, 7]] == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_normalisation_is_idempotent_and_the_models(noise, dtype):
    """Stored rows are normalised again on loading, by torch: that must not change them."""
    noise[:, 4] = 0.3
    normal = signals.normalize_leads(noise.astype(dtype))
    np.testing.assert_allclose(signals.normalize_leads(normal), normal, rtol=0, atol=1e-6)
    by_model = model.scale_minmax(torch.from_numpy(noise.astype(dtype)), dim=0).numpy()
    np.testing.assert_allclose(normal, by_model, rtol=0, atol=1e-6)


# ---- resampling

def test_500_hz_is_left_alone(noise):
    """Records at the arrays' rate are not touched."""
    assert np.array_equal(signals.resample(noise, 500), noise)


@pytest.mark.parametrize("peak", [0.05, 0.5, 3.33, 5.0, 9.5, 9.9])
def test_resampling_keeps_time(peak):
    """A peak at t seconds of a 100 Hz record is at t seconds at 500 Hz, and the record is 5000 samples long."""
    bump = np.exp(-0.5 * ((np.arange(1000) / 100 - peak) / 0.03) ** 2)
    resampled = signals.resample(np.stack([bump, 2 * bump], axis=1), 100)
    assert resampled.shape == (5000, 2)
    assert (np.abs(resampled.argmax(axis=0) - 500 * peak) <= 1).all()
    np.testing.assert_allclose(resampled.max(axis=0), [1, 2], rtol=0.02)


def test_resampling_does_not_ring_at_the_ends():
    """A lead with an offset and a drift comes back as the same line, also at both ends."""
    line = np.linspace(4, 6, 1000)
    expected = np.interp(np.arange(5000) / 500, np.arange(1000) / 100, line)
    np.testing.assert_allclose(signals.resample(line[:, None], 100)[:, 0], expected, atol=0.02)


# ---- reading

def test_record_is_read_in_mv(tmp_path):
    """A PTB-XL record comes back as (5000, 12) in mV, to the resolution of its file."""
    read = signals.read_record(write_record(tmp_path, make_ecg()), 500)
    assert read.shape == (5000, 12)
    np.testing.assert_allclose(read, make_ecg(), atol=0.0006)


def test_leads_are_found_by_name(tmp_path):
    """Another order of leads and another spelling (PTB-XL writes AVR for aVR) give the same array."""
    order = np.random.default_rng(1).permutation(12)
    path = write_record(tmp_path, make_ecg()[:, order], [LEAD_NAMES[lead].upper() for lead in order])
    np.testing.assert_allclose(signals.read_record(path, 500), make_ecg(), atol=0.0006)


def test_further_leads_are_ignored(tmp_path):
    """A record with a 13th channel is read as its 12 leads."""
    path = write_record(tmp_path, np.insert(make_ecg(), 0, 3, axis=1), ("MCG", *LEAD_NAMES))
    np.testing.assert_allclose(signals.read_record(path, 500), make_ecg(), atol=0.0006)


@pytest.mark.parametrize("unit, scale, gain, baseline", [
    ("mV", 1, 200.0, 0), ("mV", 1, 1000.0, 150), ("uV", 1000, 2.0, 0), ("UV", 1000, 5.0, -20)])
def test_gain_and_unit_are_converted(tmp_path, unit, scale, gain, baseline):
    """The test set stays in mV, so a record in another unit or with another gain must arrive in mV too."""
    path = write_record(tmp_path, make_ecg() * scale, unit=unit, gain=gain, baseline=baseline)
    np.testing.assert_allclose(signals.read_record(path, 500), make_ecg(), atol=0.003)


@pytest.mark.parametrize("unit", ["\u00b5V", "\u03bcV"])
def test_greek_microvolts_are_not_volts(tmp_path, unit):
    """A header that spells microvolts with a Greek letter is converted or refused, never read as volts."""
    path = write_record(tmp_path, make_ecg() * 1000, unit="uV", gain=5.0)
    edit_header(path, ("/uV", f"/{unit}"))
    try:
        read = signals.read_record(path, 500)
    except RecordError as error:
        assert "unit" in str(error)
    else:
        np.testing.assert_allclose(read, make_ecg(), atol=0.003)


def test_100_hz_record_keeps_its_place_in_time(tmp_path):
    """The small download gives (5000, 12) too, with every R wave where the 500 Hz record has it."""
    low = signals.read_record(write_record(tmp_path, make_ecg(100), rate=100), 100)
    assert low.shape == (5000, 12)
    for beat in BEATS:
        around = slice(int(beat * 500) - 100, int(beat * 500) + 100)
        assert (np.abs(low[around].argmax(axis=0) - make_ecg()[around].argmax(axis=0)) <= 2).all()


def remove_lead(folder):
    write_record(folder, make_ecg()[:, :11], LEAD_NAMES[:11])


def remove_sample(folder):
    ecg = make_ecg()
    ecg[1234, 3] = np.nan               # written as WFDB's missing value, -32768
    write_record(folder, ecg)


def shorten(folder):
    write_record(folder, make_ecg(seconds=9))


def slow_down(folder):
    write_record(folder, make_ecg(250), rate=250)


def change_unit(folder):
    write_record(folder, make_ecg(), unit="mmHg")


def truncate(folder):
    data = write_record(folder, make_ecg()).with_suffix(".dat")
    data.write_bytes(data.read_bytes()[:50001])


def empty_data(folder):
    write_record(folder, make_ecg()).with_suffix(".dat").write_bytes(b"")


def remove_data(folder):
    write_record(folder, make_ecg()).with_suffix(".dat").unlink()


def garble_header(folder):
    write_record(folder, make_ecg()).with_suffix(".hea").write_bytes(bytes(range(256)))


def remove_names(folder):
    edit_header(write_record(folder, make_ecg()), (" aVR", ""))


def remove_signals(folder):
    (folder / "record.hea").write_text("record 0 500 5000\n")


@pytest.mark.parametrize("damage, reason", [
    (remove_lead, r"no lead V6$"), (remove_sample, r"missing samples in lead aVR"), (shorten, r"^9 s long"),
    (slow_down, r"250 Hz, expected 500"), (change_unit, r"unit mmHg"), (truncate, r"unreadable"),
    (empty_data, r"unreadable"), (remove_data, r"unreadable .FileNotFound"), (garble_header, r"unreadable"),
    (remove_names, r"no lead aVR|unreadable"), (remove_signals, r"no lead|no signal|unreadable")])
def test_unusable_records_say_why(tmp_path, damage, reason):
    """Whatever is wrong with a record, it is a RecordError whose one-line reason names the thing, for the audit."""
    damage(tmp_path)
    with pytest.raises(RecordError, match=reason) as caught:
        signals.read_record(tmp_path / "record", 500)
    assert "\n" not in str(caught.value)


# ---- R peaks

@pytest.mark.filterwarnings("ignore::RuntimeWarning")       # HeartPy's, of measures that are not used
def test_r_peaks_are_heartpys_and_at_the_beats():
    """The R peaks of a clean ECG are the peaklist of HeartPy's process(), one at each beat to 10 ms."""
    lead = signals.filter_leads(make_ecg())[:, signals.LEAD_II]
    found = signals.find_r_peaks(lead)
    assert found.dtype == np.int32
    assert np.array_equal(found, heartpy.process(lead, 500.0)[0]["peaklist"])
    assert len(found) == len(BEATS) and np.abs(found - 500 * BEATS).max() <= 5


def test_r_peaks_do_not_depend_on_the_unit():
    """R peaks are found in mV, and again from normalised rows where a sidecar is missing: they must agree."""
    filtered = signals.filter_leads(make_ecg()).astype(np.float32)
    found = signals.find_r_peaks(filtered[:, 1])
    assert len(found) == len(BEATS)
    assert np.array_equal(found, signals.find_r_peaks(signals.normalize_leads(filtered)[:, 1]))
    assert np.array_equal(found, signals.find_r_peaks(1000 * filtered[:, 1]))


DEGENERATE = {"zeros": np.zeros(5000), "flat": np.full(5000, 0.7), "negative": np.full(5000, -3.0),
              "NaN": np.full(5000, np.nan), "infinite": np.full(5000, np.inf), "none": np.zeros(0), "one": np.ones(1),
              "spike": np.eye(1, 5000, 2500)[0], "step": np.repeat([0.0, 1.0], 2500), "ramp": np.arange(5000.0)}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_leads_have_no_r_peaks_or_valid_ones(name):
    """HeartPy raises all kinds of errors on leads without a rhythm: each means an empty array, no record is dropped."""
    lead = DEGENERATE[name].copy()
    check_r_peaks(signals.find_r_peaks(lead), len(lead))
    assert np.array_equal(lead, DEGENERATE[name], equal_nan=True), "the lead was changed in place"


def test_noise_never_raises():
    """White noise, drift, sines and square steps, filtered or not, end in an empty or a valid array, never an error."""
    random = np.random.default_rng(2)
    for draw in range(60):
        lead = (random.normal(size=5000), np.cumsum(random.normal(size=5000)),
                np.sin(np.arange(5000) * random.uniform(0.001, 1)), np.repeat(random.normal(size=50), 100),
                (random.random(5000) < 0.003) * 1.0)[draw % 5]
        check_r_peaks(signals.find_r_peaks(lead if draw % 2 else signals.filter_leads(lead[:, None])[:, 0]), 5000)


def check_r_peaks(found, samples):
    assert found.dtype == np.int32 and found.ndim == 1
    assert (np.diff(found) > 0).all() and ((found >= 0) & (found < samples)).all()


def test_wfdb_and_heartpy_are_imported_late():
    """Training and scoring on prepared arrays run on a machine that has neither."""
    code = "import arrays, sys; sys.exit(bool({'wfdb', 'heartpy'} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[1], check=False)
    assert finished.returncode == 0
