"""Scores and maps: their values, and that how the work is batched does not show in them."""
import numpy as np
import plain
import pytest
import torch
from scipy.ndimage import gaussian_filter1d
from small import make_model, make_records, shrink

from ecg.arrays import Records
from model import compute_trend
from scoring import passes
from scoring.fused import FusedMCF
from scoring.passes import Scorer
from scoring.protocols import CLEAN, PAPER, PROTOCOLS, protocols_for
from utils import UserError

MINMAX = {"kind": "minmax"}
COMPAND = {"kind": "compand", "exponent": 0.1, "linear_below": 0.005, "scale": [1.0 + 0.1 * lead for lead in range(12)]}


@pytest.fixture
def small_model(monkeypatch):
    shrink(monkeypatch)
    return make_model()


@pytest.fixture(scope="module")
def some():
    """Four records in mV with their R peaks, three each, the last without any."""
    signals, r_peaks = make_records(0, 4)
    return Records(signals, "test.npy"), [found[1:4] for found in r_peaks[:3]] + [np.zeros(0, np.int32)]


def test_fused_network_is_the_plain_one(model):
    """The form in which scoring runs the network restores what the plain network restores, and leaves it as it is."""
    generator = torch.Generator().manual_seed(0)
    ecg, beat = torch.rand(2, 4800, 12, generator=generator), torch.rand(2, 480, 12, generator=generator)
    trend, before = compute_trend(ecg), {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        fused = FusedMCF(model.train())
        assert model.training
        found = fused.restore(fused.encode_global(ecg), fused.encode_local(beat),
                              fused.begin_trend(fused.encode_trend(trend)))
        expected = model.eval()(ecg, beat, trend)
    for one, other in zip((*found[0], *found[1], found[2]), (*expected[0], *expected[1], expected[2])):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
@pytest.mark.parametrize("median", [False, True])
def test_batching_and_choosing_rows_do_not_show(small_model, some, protocol, median, monkeypatch):
    """Scores and maps are the same for any number of records and beats at once, and for rows in any order."""
    records, r_peaks = some
    scorer = Scorer(small_model, protocol, median=median)
    whole, rows = scorer.score(records, r_peaks, with_maps=True), [3, 1, 2]
    monkeypatch.setattr(passes, "RECORDS_AT_ONCE", {"cpu": 3})
    monkeypatch.setattr(passes, "BEATS_AT_ONCE", {"cpu": 5})
    for part, chosen in ((scorer.score(records, r_peaks, with_maps=True), range(4)),
                         (scorer.score(records, r_peaks, rows, with_maps=True), rows)):
        np.testing.assert_allclose(part.scores, whole.scores[chosen], rtol=1e-5)
        np.testing.assert_allclose(part.maps, whole.maps[chosen], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("protocol, median, input_", [
    (PAPER, False, MINMAX), (CLEAN, False, MINMAX), (CLEAN, True, MINMAX), (CLEAN, True, COMPAND)])
def test_scores_and_maps_of_the_plain_loop(model, published_state, some, monkeypatch, protocol, median, input_):
    """As of one beat and one mask at a time, or of one median beat whose errors lie at every beat's place.

    The last record has no beat.
    """
    records, r_peaks = some
    monkeypatch.setattr(model, "input", input_)
    scorer, rows = Scorer(model, protocol, median=median), [1] if median else [1, 3]
    scores = scorer.score(records, r_peaks, rows).scores
    maps = scorer.score(records, r_peaks, rows, with_maps=True).maps
    options = {"compand_by": (0.1, 0.005, COMPAND["scale"]) if input_ is COMPAND else None, "median": median}
    with torch.inference_mode():
        for place, row in enumerate(rows):
            record, of_map = records.signals[row].astype(float), (protocol, row) != (PAPER, 3)
            score, heat = plain.score_record(published_state, record, r_peaks[row], protocol.name, of_map, **options)
            if protocol is PAPER and of_map:                # maps are of the normalised record
                _, heat = plain.score_record(published_state, plain.normalize(record), r_peaks[row], "paper")
            assert scores[place] == pytest.approx(score, rel=1e-4)
            assert not of_map or np.abs(maps[place] - heat).max() <= 1e-4 * heat.max()


def test_which_beats_and_protocols(small_model):
    """clean sees the median beat, unless asked otherwise, paper every beat; companded input has no paper protocol."""
    assert not Scorer(small_model, PAPER).median
    assert protocols_for(small_model, PROTOCOLS) == (PAPER, CLEAN)
    small_model.input = COMPAND
    assert Scorer(small_model, CLEAN).median and not Scorer(small_model, CLEAN, median=False).median
    assert protocols_for(small_model, PROTOCOLS) == (CLEAN,)
    with pytest.raises(UserError, match="--protocol clean"):
        protocols_for(small_model, ["paper"])


def test_unit_and_storage(small_model, some):
    """clean, and every map, sees neither unit nor offset, so arrays stored min-maxed have the maps of those in mV."""
    records, r_peaks = some
    low, high = records.signals.min(axis=1), records.signals.max(axis=1)
    stored = 2 * (records.signals - low[:, None]) / (high - low)[:, None] - 1
    normalised = Records(stored, "benchmark_data.npy", (low, high))
    for protocol in PROTOCOLS.values():
        scorer = Scorer(small_model, protocol)
        first, second = (scorer.score(one, r_peaks, [0, 1]).scores for one in (records, normalised))
        assert np.allclose(first, second, rtol=1e-4) == (protocol is CLEAN)
        first, second = (scorer.score(one, r_peaks, [0, 1], with_maps=True).maps for one in (records, normalised))
        np.testing.assert_allclose(first, second, atol=1e-4 * first.max())
    small_model.input = COMPAND
    first, second = (Scorer(small_model, CLEAN).score(one, r_peaks, [0, 1]).scores for one in (records, normalised))
    np.testing.assert_allclose(first, second, rtol=1e-4)
    with pytest.raises(UserError, match="benchmark_data.npy is normalised"):
        Scorer(small_model, CLEAN).score(Records(stored, "benchmark_data.npy", in_millivolts=False), r_peaks)


@pytest.mark.parametrize("input_", [MINMAX, COMPAND], ids=["minmax", "compand"])
def test_restorations_are_in_millivolts(small_model, some, input_):
    """A network that restores its input perfectly gives the record back, from mV or min-maxed with bounds."""
    records, r_peaks = some
    low, high = records.signals.min(axis=1), records.signals.max(axis=1)
    stored = Records(2 * (records.signals - low[:, None]) / (high - low)[:, None] - 1, "train.npy", (low, high))
    small_model.input = input_
    scorer = Scorer(small_model, CLEAN)

    def perfect(block):
        for number in range(3):
            yield number, slice(None), ((block.ecg[block.owners], None), None, None)
    scorer.passes = perfect
    for one in (records, stored):
        original, restored = scorer.restore(one, r_peaks, [0, 2])
        np.testing.assert_allclose(original, records.signals[[0, 2], 100:4900], atol=1e-5)
        limit = np.array(input_.get("scale", [np.inf] * 12))                        # companding keeps no more
        np.testing.assert_allclose(restored, original.clip(-limit, limit), atol=1e-3)


def test_restoration_is_of_the_passes_that_hide(small_model, some):
    """Each sample is the mean over beats of the pass that masks it."""
    records, r_peaks = some
    scorer = Scorer(small_model, CLEAN)

    def numbered(block):
        for number in range(3):
            yield number, slice(None), ((torch.full((len(block.beats), 4800, 12), number / 2 - 0.5), None), None, None)
    scorer.passes = numbered
    original, restored = scorer.restore(records, r_peaks, [2])
    low, high = records.signals[2].min(axis=0), records.signals[2].max(axis=0)
    expected = (np.arange(4800) // 48 % 3)[:, None] / 4 + 0.25
    np.testing.assert_allclose((restored[0] - low) / (high - low), np.broadcast_to(expected, (4800, 12)), atol=1e-4)


def test_smoothing_is_scipys():
    """Maps are smoothed as by scipy's gaussian_filter1d, up to their very ends."""
    maps = np.random.default_rng(0).random((2, 700, 3)).astype(np.float32)
    found = passes.smooth_maps(torch.from_numpy(maps)).numpy()
    np.testing.assert_allclose(found, gaussian_filter1d(maps, passes.SMOOTHING, axis=1), rtol=1e-5)


@pytest.mark.parametrize("power", [-40, -3, 6])
@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_any_record_gets_a_finite_score(small_model, protocol, power):
    """Any accepted record with R peaks anywhere, even outside it, gets finite scores and maps."""
    rng = np.random.default_rng(0)
    records = Records((rng.normal(size=(2, 5000, 12)) * 10.0 ** power).clip(-1e6, 1e6).astype(np.float32), "record")
    r_peaks = [rng.integers(-10 ** 6, 10 ** 6, 30), np.array([-7, 140, 200, 201, 4399, 4660, 5000])]
    scored = Scorer(small_model, protocol).score(records, r_peaks, with_maps=True)
    assert np.isfinite(scored.scores).all() and np.isfinite(scored.maps).all()


def test_unsound_weights_and_full_memory_are_told(small_model, some, monkeypatch):
    """A score that is not finite names the row; a GPU whose memory is full names the remedy."""
    records, r_peaks = some
    scorer = Scorer(small_model, CLEAN)
    monkeypatch.setattr(scorer, "score_block", lambda block, _: (torch.tensor([0.5, torch.nan]), None))
    with pytest.raises(UserError, match="row 3 of test.npy no finite score"):
        scorer.score(records, r_peaks, [2, 3])

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(scorer, "score_block", full)
    with pytest.raises(UserError, match="--device cpu"):
        scorer.score(records, r_peaks)
