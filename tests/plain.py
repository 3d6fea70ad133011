"""The method written as plainly as the paper states it, one record, one beat, one mask at a time: the tests' oracle.

It shares no code with the product beyond numpy, scipy and torch, and reads weights in the published key names.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d


def normalize(signal):
    """Min-max of every lead to [-1, 1], a flat lead to 0."""
    out = np.zeros_like(signal)
    for lead in range(signal.shape[1]):
        low, high = signal[:, lead].min(), signal[:, lead].max()
        if high > low:
            out[:, lead] = 2 * (signal[:, lead] - low) / (high - low) - 1
    return out


def compand(signal, exponent, linear_below, scale):
    """Every value: its sign times min(1, |mV| / scale of the lead) to the exponent; a straight line near 0."""
    out = np.zeros_like(signal)
    for lead in range(signal.shape[1]):
        for t, value in enumerate(signal[:, lead]):
            size = min(1, max(abs(value), linear_below) / scale[lead]) ** exponent
            out[t, lead] = size * (value / linear_below if abs(value) < linear_below else math.copysign(1, value))
    return out


def median_beat(record, beats):
    """The beat whose every sample is the median of all beats' samples."""
    out = np.zeros((480, record.shape[1]))
    for t in range(480):
        for lead in range(record.shape[1]):
            values = sorted(float(record[r - 140 + t, lead]) for r in beats)
            half = len(values) // 2
            out[t, lead] = values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2
    return out


def trend_of(ecg):
    """(4800, 12) -> its smooth difference, min-max over all leads jointly."""
    trend = np.zeros_like(ecg)
    for t in range(5, len(ecg) - 5):
        trend[t] = (ecg[t + 5] - ecg[t - 5]) / 10
    low, high = trend.min(), trend.max()
    return 2 * (trend - low) / (high - low) - 1 if high > low else np.zeros_like(ecg)


def batch_norm(state, name, x):
    scale = state[f"{name}.weight"] / torch.sqrt(state[f"{name}.running_var"] + 1e-5)
    return (x - state[f"{name}.running_mean"][:, None]) * scale[:, None] + state[f"{name}.bias"][:, None]


def encode(state, branch, signal):
    """(samples, 12) -> tokens (hidden, tokens)."""
    x = signal.T[None]
    for layer in range(5):
        x = F.conv1d(x, state[f"{branch}_encoder.main.{max(0, 3 * layer - 1)}.weight"], stride=2, padding=1)
        if layer:
            x = batch_norm(state, f"{branch}_encoder.main.{3 * layer}", x)
        x = F.leaky_relu(x, 0.2)
    return F.conv1d(x, state[f"{branch}_encoder.main.14.weight"])[0]


def decode(state, branch, tokens):
    """(hidden, tokens) -> (samples, channels)."""
    x = F.conv_transpose1d(tokens[None], state[f"{branch}_decoder.main.0.weight"])
    for layer in range(5):
        x = F.relu(batch_norm(state, f"{branch}_decoder.main.{3 * layer + 1}", x))
        x = F.conv_transpose1d(x, state[f"{branch}_decoder.main.{3 * layer + 3}.weight"], stride=2, padding=1)
    return torch.tanh(x)[0].T


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def forward(state, masked_global, masked_local, trend):
    """One record and one beat through the network: three pairs (restored, log-variance), the trend's without one."""
    tokens = torch.cat([encode(state, "global", masked_global), encode(state, "local", masked_local)], dim=1)
    query, key, value = (linear(state, f"attn.linear_layers.{part}", tokens.T) for part in range(3))
    heads, width = [], query.shape[1] // 2
    for head in (slice(0, width), slice(width, None)):
        weights = torch.softmax(query[:, head] @ key[:, head].T / math.sqrt(width), dim=1)
        heads.append(weights @ value[:, head])
    x = tokens.T + linear(state, "attn.output_linear", torch.cat(heads, dim=1))
    x = (state["layer_norm.a_2"] * (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)
         + state["layer_norm.b_2"]).T
    new = {}
    for branch in ("global", "local"):
        new[branch] = linear(state, f"{branch}_mlp.2", F.relu(linear(state, f"{branch}_mlp.0", x)))
    global_tokens, local_tokens = tokens[:, :136] + new["global"], tokens[:, 136:] + new["local"]
    of_global, of_local = decode(state, "global", global_tokens), decode(state, "local", local_tokens)
    of_trend = decode(state, "trend", torch.cat([global_tokens, encode(state, "trend", trend)]))
    return (of_global[:, :12], of_global[:, 12:]), (of_local[:, :12], of_local[:, 12:]), of_trend


def pass_masks(protocol, number, ratio=30):
    """The masked samples of a pass: (global indices, local indices)."""
    if protocol == "paper":
        begin = (20, 70, 120, 170, 220)[number % 5]
        return ([48 * number + 4800 // ratio * k + i for k in range(ratio) for i in range(48)],
                list(range(begin, begin + 100)))
    passes = max(2, round(100 / ratio))
    return ([48 * patch + i for patch in range(100) if patch % passes == number for i in range(48)],
            [i for i in range(480) if i * passes // 480 == number])


def score_record(state, record, r_peaks, protocol, with_map=True, compand_by=None, median=False):
    """A record as the protocol feeds it (5000, 12) -> (detection score, smoothed localization map (4800, 12) or None).

    compand_by: (exponent, linear_below, scale), in place of min-max; median: one beat in place of all. The network runs
    where its weights are.
    """
    device = state["layer_norm.a_2"].device
    change = normalize if compand_by is None else lambda signal: compand(signal, *compand_by)
    places = [r for r in r_peaks if 200 < r < 4400] or list(range(340, 4400, 480))
    beats = [(change(record[r - 140:r + 340]), [r]) for r in places]
    if median:
        beats = [(change(median_beat(record, places)), places)]
    ecg = (change(record) if protocol == "clean" else record)[100:4900]
    trend = torch.tensor(trend_of(ecg), dtype=torch.float32, device=device)
    scores, whole = [], np.zeros((4800, 12))
    local, count = np.zeros((5000, 12)), np.zeros((5000, 1))
    for beat, places_of_beat in beats:
        for number in range(3):
            global_masked, local_masked = pass_masks(protocol, number)
            masked_ecg, masked_beat = ecg.copy(), beat.copy()
            masked_ecg[global_masked], masked_beat[local_masked] = 0, 0
            (x_g, s_g), (x_l, s_l), x_t = (
                output if torch.is_tensor(output) else tuple(output) for output in
                forward(state, torch.tensor(masked_ecg, dtype=torch.float32, device=device),
                        torch.tensor(masked_beat, dtype=torch.float32, device=device), trend))
            x_g, s_g, x_l, s_l, x_t = (output.cpu().numpy() for output in (x_g, s_g, x_l, s_l, x_t))
            e_g = np.exp(-s_g) * (x_g - ecg) ** 2
            e_l = np.exp(-s_l) * (x_l - beat) ** 2
            e_t = (x_t - ecg) ** 2
            scores.append(e_g.mean() + e_l.mean() + e_t.mean())
            if not with_map:
                continue
            whole += (e_g + e_t) / (3 * len(beats))
            for r in places_of_beat:
                local[r - 140:r + 340] += e_l / 3
                count[r - 140:r + 340] += 1 / 3
    if not with_map:
        return np.mean(scores), None
    if protocol == "clean":
        local /= np.maximum(count, 1)
    return np.mean(scores), gaussian_filter1d(whole + local[100:4900], 15, axis=0)
