"""The lesion benchmark: one lesion implanted in a real normal ECG, with exact truth per lead and sample.

An ECG is (5000, 12) in mV at 500 Hz, filtered as signals.filter_leads does. A lesion is a difference (delta) on the
eight independent leads I, II, V1 ... V6 as it would be before the high-pass; III, aVR, aVL and aVF follow from I and
II, so Einthoven's and Goldberger's laws hold as far as they did before. The delta then passes the zero-phase high-pass
that the ECG has passed: filtering is linear, so the sum is the diseased heart's ECG, filtered.

Truth: a point is marked where the delta exceeds 20 uV in one direction both before and after the high-pass. Before it
alone would mark what the filter takes away; after it alone the undershoot that it draws beside every lesion, up to a
second away, where the heart is normal. Gaps below 40 ms, where a change crosses zero, are marked too, and reciprocal
changes in the derived leads are marked as what they are. A point that changed by more than 20 uV and is not marked, as
the undershoot, is arrays.EXCLUDED: it is not as recorded, and it is no lesion.

A premature beat takes the place of a sinus beat that is not conducted, and the sinus node keeps its time: the pause is
fully compensatory, and no other beat moves. Marked is the premature beat, from its onset to the end of its T, by the
same 20 uV against the recorded ECG. The rest of the pause has no phase (0). Points without a phase are EXCLUDED too:
that nothing happens there is a consequence of the lesion, neither normal nor its place.
"""
import zlib
from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import binary_closing

from ecg.arrays import EXCLUDED
from ecg.leads import TO_TWELVE
from ecg.ludb import PHASES
from ecg.signals import RECORD_LENGTH, SAMPLING_RATE
from ecg.waveforms import (Ecg, add, high_pass, low_pass, on_leads, read_ecg, recorded, recorded_beat,
                           recorded_p, ventricular_beat, window)
from ecg.waves import phases_of, samples

VISIBLE = 0.020                     # mV: a change is marked above it
GAP = samples(40)                   # what is shorter between two marks is marked too
LESIONS = 3                         # of a record, each in an ECG of its own
# Columns of the eight. What I alone does, aVL does too, and III the reverse; what II alone does, III and aVF do too.
TERRITORIES = {"septal": [2, 3], "anterior": [3, 4, 5], "lateral": [0, 6, 7], "inferior": [1]}
LIMB, CHEST = [0, 1], [2, 3, 4, 5, 6, 7]
# The late forces in I, II, V1 ... V6 as a share of the tallest: R' in V1 and S in I and V6, or broad R in I, V5 and V6.
LATE_FORCES = {"right bundle branch block": (-0.35, -0.15, 1, 0.75, 0.25, -0.10, -0.35, -0.40),
               "left bundle branch block": (0.70, 0.25, -0.70, -1, -0.80, 0.10, 0.80, 0.90)}
# QRS of beats from the right outflow tract, where most idiopathic ones begin, and from the left ventricle's lower wall.
VENTRICULAR_BEATS = {"right outflow tract": (0.20, 0.90, -0.70, -0.90, -0.40, 0.50, 0.80, 0.75),
                     "inferior left ventricle": (0.40, -0.80, 0.80, 1, 0.80, 0.30, -0.30, -0.60)}
ECTOPIC_P = (0.50, -0.90, 1.30, -0.60, -0.60, -0.60, -0.70, -0.70)      # times P: from low in the atrium
KINDS = {"none": "no lesion"}       # name -> title
MAKERS = {}                         # name -> function (Ecg, rng) -> Lesion, or None where the ECG has no room for it


@dataclass
class Lesion:
    """delta: (5000, 8) mV before the high-pass; phases: (5000,) of the changed ECG; span: of the truth."""
    delta: np.ndarray
    description: str
    phases: np.ndarray
    span: tuple = (0, RECORD_LENGTH)


def kind(name: str, title: str):
    """Enter a function (Ecg, rng) -> Lesion | None as the maker of a kind."""
    def enter(maker):
        KINDS[name], MAKERS[name] = title, maker
        return maker
    return enter


def milliseconds(length: float) -> str:
    """Samples at 500 Hz in words."""
    return f"{1000 * length / SAMPLING_RATE:.0f} ms"


def pick_territory(rng, suitable=lambda columns: True) -> str | None:
    """The name of one of the TERRITORIES of whose columns suitable() holds; None where there is none."""
    names = [name for name, columns in TERRITORIES.items() if suitable(columns)]
    return str(rng.choice(names)) if names else None


def qrs_edges(ecg: Ecg) -> tuple:
    """Onset and end of QRS after R, with 10 ms more on either side for a window's ramps."""
    return ecg.waves.qrs[0] - samples(10), ecg.waves.qrs[1] + samples(10)


@kind("t_wave", "T wave flat or inverted")
def change_t(ecg: Ecg, rng) -> Lesion | None:
    """Flat is T within 0.1 mV of 0; inverted, -0.1 to -0.5 mV (Rautaharju 2009, J Am Coll Cardiol 53:982)."""
    onset, end = (ecg.waves.qrs[1] + ecg.waves.t[0]) // 2, ecg.waves.t[1] + samples(10)
    height = ecg.typical(onset, end).max(axis=0)
    territory = pick_territory(rng, lambda columns: height[columns].min() >= 0.1)
    if territory is None:
        return None
    columns, flat = TERRITORIES[territory], rng.random() < 0.3
    tallest = height[columns].max()
    factor = rng.uniform(-0.1, 0.1) if flat else -np.clip(rng.uniform(0.5, 1) * tallest, 0.15, 0.5) / tallest
    waves = sum(recorded(ecg.smooth, r + onset, r + end, samples(30)) for r in ecg.beats)
    description = f"T {'flat' if flat else 'inverted'}, x {factor:.1f}, {territory}"
    return Lesion(waves * on_leads(columns, factor - 1), description, ecg.phases)


@kind("st_segment", "ST segment up or down")
def shift_st(ecg: Ecg, rng) -> Lesion:
    """Up from 0.1 mV, in V2 and V3 from 0.15 to 0.25; down from 0.05 mV (Thygesen 2018, J Am Coll Cardiol 72:2231).

    Of what is drawn, at J, the high-pass leaves about two thirds between ST and the line from T to P.
    """
    territory, sign = pick_territory(rng), rng.choice([-1, 1])
    size = sign * rng.uniform(0.25 if sign > 0 and territory in ("septal", "anterior") else 0.18, 0.3)
    columns, j_point, (onset, end) = TERRITORIES[territory], ecg.waves.qrs[1], ecg.waves.t
    shape = sum(window(r + j_point - samples(30), r + j_point + samples(8), r + (2 * onset + end) // 3, r + end)
                for r in ecg.beats)
    delta = shape * on_leads(columns, size * rng.uniform(0.85, 1, len(columns)))
    return Lesion(delta, f"ST {size:+.2f} mV, {territory}", ecg.phases)


@kind("q_wave", "pathological Q wave")
def add_q(ecg: Ecg, rng) -> Lesion:
    """Q of 30 ms and 0.1 mV, or QS, in neighbouring leads (Thygesen 2018); here at least a quarter of R, too.

    It begins before the recorded QRS by 0.3 of its width, so that the R that follows stays, and takes away an r.
    """
    territory, width = pick_territory(rng), samples(rng.uniform(46, 62))
    columns, onset, ahead, middle = TERRITORIES[territory], ecg.waves.qrs[0], int(0.3 * width), width // 2
    qrs = ecg.typical(*ecg.waves.qrs)[:, columns]
    tall, low = qrs.max(axis=0), -qrs.min(axis=0)
    depth = np.maximum(rng.uniform(0.20, 0.35), rng.uniform(0.25, 0.40) * tall) * rng.uniform(0.85, 1, len(columns))
    size = depth + np.where(low > tall, np.minimum(tall, 0.3), np.maximum(qrs[middle - ahead], 0))
    starts = ecg.r_peaks + onset - ahead
    shape = sum(window(start, start + middle, start + middle, start + width) for start in starts)
    waves = replace(ecg.waves, qrs=(onset - ahead, ecg.waves.qrs[1]))
    return Lesion(low_pass(-shape * on_leads(columns, size)), f"Q {milliseconds(width)}, {territory}",
                  phases_of(waves, ecg.beats, RECORD_LENGTH))


@kind("r_loss", "loss of R wave")
def lose_r(ecg: Ecg, rng) -> Lesion | None:
    """R of V3 at most 0.3 mV (Zema 1982, Arch Intern Med 142:1145), or QS, as after an infarction (Thygesen 2018)."""
    onset, end = qrs_edges(ecg)
    typical = ecg.typical(onset, end)
    territory = pick_territory(rng, lambda columns: typical.max(axis=0)[columns].min() >= 0.3)
    if territory is None:
        return None
    columns, left, deep = TERRITORIES[territory], rng.uniform(0.10, 0.35), rng.uniform(0.3, 0.5)
    qrs = sum(recorded(ecg.eight, r + onset, r + end) for r in ecg.r_peaks)
    if rng.random() < 0.5:
        corner = 0.10                                           # mV: rounds off where the positive part begins
        positive = (qrs + np.sqrt(qrs ** 2 + corner ** 2) - corner) / 2
        return Lesion(positive * on_leads(columns, left - 1), f"R reduced, x {left:.1f}, {territory}", ecg.phases)
    depth, middle = np.maximum(deep * typical.max(axis=0), -typical.min(axis=0)), (onset + end) / 2
    wave = low_pass(sum(window(r + onset, r + middle, r + middle, r + end) for r in ecg.r_peaks))
    return Lesion((-qrs - wave * depth) * on_leads(columns, 1), f"QS instead of R, {territory}", ecg.phases)


@kind("wide_qrs", "QRS widened, bundle branch block")
def widen_qrs(ecg: Ecg, rng) -> Lesion:
    """QRS of 120 ms or more (Surawicz 2009, J Am Coll Cardiol 53:976): the forces of the late ventricle are added.

    On the left they begin early and go on flat, and take away q and r of the septum. T turns against them, secondarily.
    """
    block = str(rng.choice(list(LATE_FORCES)))
    width, size = samples(rng.uniform(130, 165)), rng.uniform(0.6, 0.9) * np.clip(ecg.voltage, 0.7, 1.4)
    forces = np.array(LATE_FORCES[block]) * rng.uniform(0.85, 1.15, len(LATE_FORCES[block])) * size
    onset, (t_onset, t_end) = ecg.waves.qrs[0], ecg.waves.t
    t_peak = (t_onset + t_end) // 2
    shares = (-0.05, 0.42, 0.65, 1) if block.startswith("left") else (0.3, 0.65, 0.7, 1)
    shape = sum(window(*(r + onset + share * width for share in shares))
                - 0.6 * window(r + onset + 0.75 * width, r + t_peak, r + t_peak, r + t_end) for r in ecg.r_peaks)
    waves = replace(ecg.waves, qrs=(onset, onset + width), t=(max(t_onset, onset + width), t_end))
    return Lesion(low_pass(shape * forces), f"QRS {milliseconds(width)}, {block}",
                  phases_of(waves, ecg.beats, RECORD_LENGTH))


@kind("p_loss", "P wave removed")
def remove_p(ecg: Ecg, rng) -> Lesion | None:
    """No P before a narrow regular QRS: sinus arrest, junctional rhythm (Kusumoto 2019, J Am Coll Cardiol 74:e51)."""
    if ecg.waves.p is None:
        return None
    delta = np.zeros_like(ecg.eight)
    for r in ecg.beats:
        start, wave = recorded_p(ecg, r)
        add(delta, start, -wave)
    return Lesion(delta, "P removed, all leads", ecg.phases)


@kind("long_pr", "PR interval prolonged")
def prolong_pr(ecg: Ecg, rng) -> Lesion | None:
    """PR above 200 ms (Kusumoto 2019). P moves away from QRS, at most to the end of T; both its places are marked."""
    if ecg.waves.p is None:
        return None
    present = ecg.waves.qrs[0] - ecg.waves.p[0]
    room = np.diff(ecg.r_peaks).min() + ecg.waves.p[0] - ecg.waves.t[1] + samples(16)
    shortest, longest = max(samples(220), present + samples(40)), min(samples(340), present + room)
    if longest < shortest:
        return None
    shift = int(rng.integers(shortest, longest + 1)) - present
    delta = np.zeros_like(ecg.eight)
    for r in ecg.beats:
        start, wave = recorded_p(ecg, r)
        add(delta, start, -wave)
        add(delta, start - shift, wave)
    waves = replace(ecg.waves, p=(ecg.waves.p[0] - shift, ecg.waves.p[1] - shift))
    return Lesion(delta, f"PR {milliseconds(present + shift)} (was {milliseconds(present)})",
                  phases_of(waves, ecg.beats, RECORD_LENGTH))


@kind("ventricular_beat", "premature ventricular beat")
def add_ventricular_beat(ecg: Ecg, rng) -> Lesion | None:
    """QRS of 120 ms or more, early, T against it, then a pause (Al-Khatib 2018, J Am Coll Cardiol 72:e91).

    It comes after the T of the beat before and no later than the sinus P, which goes on in its time, hidden or not.
    """
    if not len(ecg.steady_beats):
        return None
    index, waves = int(rng.choice(ecg.steady_beats)), ecg.waves
    before, r = ecg.r_peaks[index - 1:index + 1]
    earliest = before + waves.t[1] + samples(10)
    latest = r + (waves.p[0] if waves.p else waves.qrs[0] - samples(140)) - samples(10)
    if earliest > latest:
        return None
    onset, width = int(rng.integers(earliest, latest + 1)), samples(rng.uniform(130, 180))
    end = onset + width + samples(270 * np.sqrt(waves.rr / SAMPLING_RATE))
    origin = str(rng.choice(list(VENTRICULAR_BEATS)))
    size = np.clip(rng.uniform(1.3, 2.0) * ecg.voltage, 0.8, 2.5)
    delta = low_pass(ventricular_beat(VENTRICULAR_BEATS[origin], size, onset, width, end, rng)) - recorded_beat(ecg, r)
    if waves.p:
        add(delta, *recorded_p(ecg, r))
    codes = phases_of(waves, np.delete(ecg.beats, index + 1), RECORD_LENGTH)
    edges = (onset, onset + width, onset + width + (end - onset - width) // 4, end)
    for name, start, stop in zip(("QRS", "ST", "T"), edges, edges[1:]):
        codes[start:stop] = 1 + PHASES.index(name)
    codes[end:r + waves.t[1]] = 0
    early = milliseconds(r + waves.qrs[0] - onset)
    return Lesion(delta, f"ventricular beat, {early} early, {origin}", codes, (onset, end))


@kind("atrial_beat", "premature atrial beat")
def add_atrial_beat(ecg: Ecg, rng) -> Lesion | None:
    """P of another shape, early, with the QRS of every beat, then a pause (Page 2016, J Am Coll Cardiol 67:e27).

    R comes at 65 to 82 % of the RR interval, and P not before the last T has ended.
    """
    if ecg.waves.p is None or not len(ecg.steady_beats):
        return None
    index = int(rng.choice(ecg.steady_beats))
    before, r = ecg.r_peaks[index - 1:index + 1]
    onset, t_end = ecg.waves.p[0], ecg.waves.t[1]
    earliest, latest = max(before + t_end - onset - samples(30), before + 0.65 * (r - before)), r - 0.18 * (r - before)
    if earliest > latest:
        return None
    early = r - int(rng.uniform(earliest, latest))
    beat, (start, wave) = recorded_beat(ecg, r), recorded_p(ecg, r)
    delta = np.roll(beat, -early, axis=0) - beat
    add(delta, start - early, wave * (ECTOPIC_P * rng.uniform(0.8, 1.2, len(ECTOPIC_P)) - 1))
    beats = np.array(ecg.beats)
    beats[index + 1] -= early
    codes = phases_of(ecg.waves, beats, RECORD_LENGTH)
    codes[r - early + t_end:r + t_end] = 0
    return Lesion(delta, f"atrial beat, {milliseconds(early)} early", codes, (r + onset - early, r - early + t_end))


@kind("voltage", "QRS voltage low or high")
def scale_qrs(ecg: Ecg, rng) -> Lesion | None:
    """Low: QRS below 0.5 mV in all limb or 1.0 mV in all chest leads (Chinitz 2008, J Electrocardiol 41:281).

    High: S of V1 and R of V5 or V6 make more than 3.5 mV (Sokolow-Lyon; Hancock 2009, J Am Coll Cardiol 53:992).
    The 25 Hz low-pass leaves 83 % of QRS (median of fold 9's normals), and the limits are as much lower here.
    """
    onset, end = qrs_edges(ecg)
    qrs = ecg.typical(onset, end)
    limb, chest = np.ptp(qrs @ TO_TWELVE[:6].T, axis=0).max(), np.ptp(qrs[:, CHEST], axis=0).max()
    low = {"low, limb": rng.uniform(0.20, 0.38) / limb, "low, chest": rng.uniform(0.45, 0.78) / chest}
    low = {name: factor for name, factor in low.items() if factor < 0.7}
    high = {"high, chest": rng.uniform(3.1, 4.2) / (qrs[:, 6:].max() - qrs[:, 2].min())}
    possible = 1.3 < high["high, chest"] < 2                    # more than twice is steeper than any normal QRS
    factors = high if possible and (not low or rng.random() < 0.5) else low
    if not factors:
        return None
    name = str(rng.choice(list(factors)))
    waves = sum(recorded(ecg.eight, r + onset, r + end) for r in ecg.r_peaks)
    columns = LIMB if name.endswith("limb") else CHEST
    description = f"QRS voltage {name}, x {factors[name]:.1f}"
    return Lesion(waves * on_leads(columns, factors[name] - 1), description, ecg.phases)


@dataclass
class Implanted:
    """A row of the benchmark. signal: (5000, 12) float32 mV; truth: (5000, 12) uint8, 1 marked, 0 normal, or EXCLUDED.

    phases: (5000,) uint8 of the changed ECG, 1 + the index into ludb.PHASES, 0 for none. kind: of KINDS.
    """
    kind: str
    description: str
    signal: np.ndarray
    truth: np.ndarray
    phases: np.ndarray


def implant(ecg: Ecg, kind: str, rng) -> Implanted | None:
    """A lesion of a kind of KINDS in a normal ECG; None where there is no room for it: no P, no upright T, ...

    "none" is the ECG as it is.
    """
    lesion = MAKERS[kind](ecg, rng) if kind in MAKERS else Lesion(np.zeros_like(ecg.eight), KINDS[kind], ecg.phases)
    if lesion is None:
        return None
    before, after = lesion.delta @ TO_TWELVE.T, high_pass(lesion.delta) @ TO_TWELVE.T
    marked = (np.minimum(before, after) > VISIBLE) | (np.maximum(before, after) < -VISIBLE)
    marked = binary_closing(marked, np.ones((GAP, 1)))
    marked[:lesion.span[0]] = marked[lesion.span[1]:] = False
    if kind in MAKERS and not marked.any():
        return None
    unclear = (np.abs(after) > VISIBLE) | (lesion.phases == 0)[:, None]
    truth = np.where(marked, 1, np.where(unclear, EXCLUDED, 0)).astype(np.uint8)
    return Implanted(kind, lesion.description, (ecg.signal + after).astype(np.float32), truth, lesion.phases)


def rng_of(ecg_id: int, name: str):
    """The generator of a record's draws of that name, the same whatever other records and kinds there are."""
    return np.random.default_rng([ecg_id, zlib.crc32(name.encode())])


def implant_some(ecg_id: int, signal: np.ndarray, r_peaks: np.ndarray, lesions: int = LESIONS) -> list:
    """The rows of a normal ECG, (5000, 12) mV with its R peaks (n,), samples: as it is, then with one lesion each.

    Returns [Implanted, ...]; a record tries the kinds in an order of its own until it has its lesions. Empty where its
    waves are not found or a beat is unlike the others.
    """
    ecg = read_ecg(signal, r_peaks)
    if ecg is None:
        return []
    rows = [implant(ecg, "none", None)]
    for name in map(str, rng_of(ecg_id, "order").permutation(list(MAKERS))):
        row = implant(ecg, name, rng_of(ecg_id, name)) if len(rows) <= lesions else None
        rows += [row] * (row is not None)
    return rows
