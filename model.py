"""MCF, the multi-scale cross-restoration network, its trend input, its loss and its checkpoints (paper, section 2).

Two masked autoencoders, one for the whole recording ("global") and one for a heartbeat ("local"), exchange what they
know by self-attention over their joined tokens; a third decoder restores the recording from its trend.

    python -c "from model import MCF; print(sum(p.numel() for p in MCF().parameters()))"    # 7085779

Every signal is (batch, samples, leads) outside the network and (batch, channels, 1, samples) inside it, where Conv2d
layers compute what Conv1d layers would. On a CPU the layers of kernel 15 are fastest with channels last in memory, all
others with samples last, above all backward (a training step of 32 records: 4.3 s for 5.3 s on a core).
"""
import io
import math
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from utils import UserError, scale_minmax, write_atomically

LEADS = 12
GLOBAL_START, GLOBAL_LENGTH = 100, 4800     # the network sees samples 100:4900 of a 5000-sample record
BEAT_BEFORE, BEAT_LENGTH = 140, 480         # a beat is samples R-140 : R+340
WIDTHS = (32, 64, 128, 256, 512)            # channels after each stride-2 convolution
TOKEN_KERNEL = 15                           # 150 feature samples -> 136 tokens, 15 -> 1
GLOBAL_TOKENS = GLOBAL_LENGTH // 2 ** len(WIDTHS) - TOKEN_KERNEL + 1
TREND_LAG = 5                               # samples, 10 ms at 500 Hz
# The log-variance: inside the decoder's Tanh, shared by the leads (paper); or none, the constant at which the published
# one ends; or one a lead, outside Tanh and only kept from overflow.
UNCERTAINTIES = ("log_variance", "constant", "free")
CONSTANT_LOGVAR, LARGEST_LOGVAR = -1.0, 10.0
# What a network may leave out (the paper's ablations), but not both of the first two.
PARTS = ("global", "local", "cross_attention", "trend")

# A checkpoint of others may hold its metrics as numpy scalars, harmless but refused by weights_only on their own.
NUMPY_SCALARS = [np.dtype, (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"), np._core.multiarray.scalar,
                 *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4"))]
# What train.py notes of each epoch, in history.csv and in its checkpoints.
HISTORY = ("epoch", "loss", "loss_global", "loss_local", "loss_trend", "lr", "val_auroc", "test_auroc", "seconds")


def build_encoder(leads: int, hidden: int) -> nn.Sequential:
    """Convolutions from (B, leads, 1, samples) to (B, hidden, 1, samples / 32 - 14)."""
    layers = []
    for inputs, width in zip((leads, *WIDTHS), WIDTHS):
        layers.append(nn.Conv2d(inputs, width, kernel_size=(1, 4), stride=(1, 2), padding=(0, 1), bias=False))
        if len(layers) > 1:                                   # no BatchNorm after the first convolution
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.LeakyReLU(0.2, inplace=True))
    layers.append(nn.Conv2d(WIDTHS[-1], hidden, (1, TOKEN_KERNEL), bias=False))
    return nn.Sequential(*layers)


def build_decoder(hidden: int, outputs: int) -> nn.Sequential:
    """Transposed convolutions from (B, hidden, 1, tokens) to (B, outputs, 1, (tokens + 14) * 32), before Tanh."""
    widths = WIDTHS[::-1]
    layers = [nn.ConvTranspose2d(hidden, widths[0], (1, TOKEN_KERNEL), bias=False)]
    for width, following in zip(widths, (*widths[1:], outputs)):
        layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                   nn.ConvTranspose2d(width, following, kernel_size=(1, 4), stride=(1, 2), padding=(0, 1), bias=False)]
    return nn.Sequential(*layers)


def build_mlp(inputs: int, inside: int, outputs: int) -> nn.Sequential:
    """Two layers along the tokens: (B, hidden, inputs) -> (B, hidden, outputs)."""
    return nn.Sequential(nn.Linear(inputs, inside), nn.ReLU(), nn.Linear(inside, outputs))


class TokenNorm(nn.Module):
    """Layer norm with the unbiased standard deviation and eps added to it, as published; nn.LayerNorm has neither."""

    def __init__(self, features: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.eps = eps

    def forward(self, x):
        deviation, mean = torch.std_mean(x, dim=-1, keepdim=True)
        return self.weight * (x - mean) / (deviation + self.eps) + self.bias


def choose_parts(branches: str = "both", cross_attention: int = 1, trend: int = 1) -> tuple:
    """PARTS less what these flags of train.py switch off. branches: "both", "global" or "local"."""
    absent = {"both": None, "global": "local", "local": "global"}[branches]
    chosen = dict.fromkeys(PARTS, True) | {"cross_attention": cross_attention, "trend": trend}
    return tuple(part for part in PARTS if chosen[part] and part != absent)


class MCF(nn.Module):
    """The cross-restoration network (paper, Fig. 2).

    enc_in: leads of a record. hidden: channels of a token. uncertainty: of UNCERTAINTIES. parts: of PARTS; what is left
    out has no weights and no output, all else stays. 7,085,779 parameters at the defaults. `input` says how records
    become its input: {"kind": "minmax"}, or {"kind": "compand", "exponent": p, "linear_below": mV, "scale": [mV of each
    lead that become 1]}, see dataloader.Normalisation.
    """

    def __init__(self, enc_in: int = LEADS, hidden: int = 50, uncertainty: str = "log_variance", parts=PARTS):
        super().__init__()
        if hidden % 2:
            raise ValueError(f"hidden must be even (two attention heads), not {hidden}")
        if uncertainty not in UNCERTAINTIES:
            raise ValueError(f"uncertainty must be one of {UNCERTAINTIES}, not {uncertainty}")
        if not set(parts) <= set(PARTS) or not {"global", "local"} & set(parts):
            raise ValueError(f"parts must be some of {PARTS}, and one of the first two among them, not {parts}")
        self.leads, self.hidden, self.uncertainty, self.parts = enc_in, hidden, uncertainty, tuple(parts)
        self.input = {"kind": "minmax"}
        logvars = {"log_variance": 1, "constant": 0, "free": enc_in}[uncertainty]
        tokens = GLOBAL_TOKENS * ("global" in parts) + ("local" in parts)

        def build(part, layers, *sizes):
            return layers(*sizes) if part in parts else None
        self.global_encoder = build("global", build_encoder, enc_in, hidden)
        self.local_encoder = build("local", build_encoder, enc_in, hidden)
        self.trend_encoder = build("trend", build_encoder, enc_in, hidden)
        self.global_decoder = build("global", build_decoder, hidden, enc_in + logvars)
        self.local_decoder = build("local", build_decoder, hidden, enc_in + logvars)
        self.trend_decoder = build("trend", build_decoder, hidden * (1 + ("global" in parts)), enc_in)
        self.attention = None
        if "cross_attention" in parts:
            self.attention = nn.MultiheadAttention(hidden, num_heads=2, dropout=0.1, batch_first=True)
            self.initialise_attention()
            self.dropout, self.norm = nn.Dropout(0.1), TokenNorm(hidden)
            self.global_mlp = build("global", build_mlp, tokens, 4 * tokens, GLOBAL_TOKENS)
            self.local_mlp = build("local", build_mlp, tokens, 2 * tokens, 1)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and layer.kernel_size[1] == TOKEN_KERNEL:
                layer.to(memory_format=torch.channels_last)

    def initialise_attention(self):
        """As four plain Linear(hidden, hidden), which the published attention is: uniform, no bias left 0."""
        limit = 1 / math.sqrt(self.hidden)
        for parameter in self.attention.parameters():
            nn.init.uniform_(parameter, -limit, limit)

    def encode_signal(self, encoder: nn.Sequential | None, signal):
        """(B, samples, leads) -> tokens (B, hidden, samples / 32 - 14): 4800 samples give 136, 480 give 1."""
        return None if encoder is None else encoder(signal.transpose(1, 2).contiguous().unsqueeze(2)).squeeze(2)

    def cross_attend(self, global_tokens, local_tokens):
        """Let the recording and the beat inform each other: (B, hidden, 136), (B, hidden, 1) -> the same shapes.

        Where one is left out (None) the other's tokens inform each other.
        """
        if self.attention is None:
            return global_tokens, local_tokens
        tokens = join_tokens(global_tokens, local_tokens, dim=2).transpose(1, 2)          # (B, 137, hidden)
        attended, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        tokens = self.norm(tokens + self.dropout(attended)).transpose(1, 2)               # (B, hidden, 137)
        return (None if global_tokens is None else global_tokens + self.global_mlp(tokens),
                None if local_tokens is None else local_tokens + self.local_mlp(tokens))

    def restore_signal(self, decoder: nn.Sequential | None, tokens):
        """Tokens -> (restored (B, samples, leads), log-variance (B, samples, 1)), of the trend's decoder unused."""
        if decoder is None:
            return None
        features, device = decoder[0](tokens.unsqueeze(2)).contiguous(), tokens.device.type     # (B, 512, 1, 150)
        features = decoder[1:-1](features)
        # bfloat16 would round most log-variances to -1, where Tanh has no gradient
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            output = decoder[-1](features.float())
        return self.read_output(output.squeeze(2).transpose(1, 2))

    def restore_trend(self, global_tokens, trend):
        """The signal (B, 4800, leads) from its trend, of that shape, and the recording's tokens."""
        if self.trend_encoder is None:
            return None
        tokens = join_tokens(global_tokens, self.encode_signal(self.trend_encoder, trend), dim=1)
        return self.restore_signal(self.trend_decoder, tokens)[0]

    def read_output(self, output):
        """A decoder's last layer (B, samples, channels) -> (restored, log-variance) as restore_signal gives them."""
        if self.uncertainty == "log_variance":
            output = torch.tanh(output)
            return output[..., :self.leads], output[..., self.leads:]
        restored = torch.tanh(output[..., :self.leads])
        if self.uncertainty == "constant":
            return restored, torch.full_like(output[..., :1], CONSTANT_LOGVAR)
        return restored, output[..., self.leads:].clamp(-LARGEST_LOGVAR, LARGEST_LOGVAR)    # (B, samples, leads)

    def forward(self, masked_global, masked_local, trend):
        """Restore a recording and one of its beats.

        masked_global: (B, 4800, leads), masked_local: (B, 480, leads), trend: (B, 4800, leads).
        Returns ((restored_global, logvar_global), (restored_local, logvar_local), restored_trend), shaped like the
        inputs, the log-variances (B, samples, 1); None in the place of what the network leaves out.
        """
        global_tokens, local_tokens = self.cross_attend(self.encode_signal(self.global_encoder, masked_global),
                                                        self.encode_signal(self.local_encoder, masked_local))
        return (self.restore_signal(self.global_decoder, global_tokens),
                self.restore_signal(self.local_decoder, local_tokens), self.restore_trend(global_tokens, trend))


def join_tokens(one, other, dim: int):
    """Both tokens joined along a dimension, or the one that there is."""
    return torch.cat([tokens for tokens in (one, other) if tokens is not None], dim=dim)


def compute_trend(signal):
    """The smooth difference that the trend branch reads (paper, section 2.2).

    signal: (B, samples, leads). trend[t] = (x[t+5] - x[t-5]) / 10, the first and last 5 samples 0, then min-max to
    [-1, 1] over all samples and leads of a record jointly; a constant record gives 0.
    """
    difference = (signal[:, 2 * TREND_LAG:] - signal[:, :-2 * TREND_LAG]) / (2 * TREND_LAG)
    trend = F.pad(difference, (0, 0, TREND_LAG, TREND_LAG))
    return scale_minmax(trend, trend.amin((1, 2), keepdim=True), trend.amax((1, 2), keepdim=True))


def restoration_errors(outputs, ecg, beat):
    """The three error maps that both the loss and the score average.

    outputs: what MCF returns; ecg: (B, 4800, leads) and beat: (B, 480, leads), unmasked.
    Returns exp(-s_g) e_g, exp(-s_l) e_l and e_t, shaped like ecg, beat and ecg (paper, eq. 3 and 4); 0 for what the
    network leaves out.
    """
    def weighted(restored, truth):
        return torch.zeros_like(truth) if restored is None else (
            torch.exp(-restored[1]) * (restored[0] - truth).square())
    of_global, of_local, restored_trend = outputs
    return (weighted(of_global, ecg), weighted(of_local, beat),
            torch.zeros_like(ecg) if restored_trend is None else (restored_trend - ecg).square())


def forward_loss(outputs, ecg, beat) -> dict:
    """The training loss over masked and unmasked samples alike (paper, eq. 3 to 5), by term.

    Arguments as restoration_errors. Returns {"global", "local", "trend", "loss"}: scalars, loss the sum of the others.
    """
    terms = dict(zip(("global", "local", "trend"), (error.mean() for error in restoration_errors(outputs, ecg, beat))))
    for term, restored in zip(terms, outputs[:2]):
        if restored is not None:
            terms[term] = terms[term] + restored[1].mean()
    return {**terms, "loss": sum(terms.values())}


def translate_published(state: dict) -> dict:
    """Bring the published implementation's `model_state_dict` to MCF's names and shapes.

    Its Conv1d weights (out, in, kernel) are (out, in, 1, kernel) here, and the three projections of its attention are
    one stacked matrix in nn.MultiheadAttention.
    """
    renamed = {"layer_norm.a_2": "norm.weight", "layer_norm.b_2": "norm.bias"}
    translated = {}
    for name, value in state.items():
        if name.startswith("attn.linear_layers"):
            continue
        name = renamed.get(name, name.replace(".main.", ".").replace("attn.output_linear", "attention.out_proj"))
        translated[name] = value.unsqueeze(2) if value.ndim == 3 else value
    for kind in ("weight", "bias"):
        translated[f"attention.in_proj_{kind}"] = torch.cat(
            [state[f"attn.linear_layers.{part}.{kind}"] for part in range(3)])     # query, key, value
    return translated


def save_checkpoint(path, model: MCF, **facts):
    """Write weights with what is known of them, atomically: plain types and tensors only. Raises UserError.

    facts: config, epoch, metrics, ... under these names beside "model_state_dict", "input", "uncertainty" and "parts".
    """
    whole = io.BytesIO()                # torch.save to a file says nothing of the disk when it is full
    torch.save({"model_state_dict": {name: value.cpu() for name, value in model.state_dict().items()},
                "input": model.input, "uncertainty": model.uncertainty, "parts": list(model.parts),
                **facts}, whole)
    write_atomically(path, lambda file: file.write(whole.getbuffer()))


def read_checkpoint(path) -> dict:
    """What a checkpoint file holds. Nothing but plain types and tensors is unpickled. Raises UserError."""
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; train one with train.py, or name another checkpoint") from None
    except Exception as error:          # on a damaged file the unpickler raises whatever it meets
        raise UserError(f"{path} cannot be read as a checkpoint of plain types and tensors ({type(error).__name__}); "
                        "name another checkpoint, or train it again") from error


def load_checkpoint(path) -> tuple:
    """Read a checkpoint of ours or of the published implementation: (model on the CPU, all else that it holds).

    The numbers of leads and of hidden channels follow from the weights, which may be of half precision. Nothing but
    plain types and tensors is unpickled. Raises UserError where the file is missing, unsafe, damaged, not of this
    network, or holds a weight that is not finite.
    """
    content = read_checkpoint(path)
    try:
        state, facts = find_weights(content)
        if "lead_scale" in facts:
            raise UserError(f"{path} was trained with --normalization scale, which is no more; train it again with "
                            "--input compand")
        encoder = "global_encoder" if "global_encoder.0.weight" in state else "local_encoder"
        model = MCF(state[f"{encoder}.0.weight"].shape[1], state[f"{encoder}.14.weight"].shape[0],
                    facts.pop("uncertainty", "log_variance"), facts.pop("parts", PARTS))
        if absent := sorted(model.state_dict().keys() - state.keys()):
            raise KeyError(absent[0])
        model.load_state_dict(state)
        model.input = read_input(facts.pop("input", model.input), model.leads)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError, OverflowError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else type(error).__name__
        raise UserError(f"{path} does not hold the weights of this network ({reason}); name another checkpoint, or "
                        "train it again") from error
    if not weights_are_finite(model):
        raise UserError(f"{path} holds weights that are NaN or infinite; name another checkpoint, or train it again")
    return model, facts


def find_weights(content: dict) -> tuple:
    """(the weights under MCF's names, all else) of a checkpoint's content, which may be the weights alone.

    Raises KeyError, AttributeError, TypeError where it is something else.
    """
    facts = dict(content)
    state = next((facts.pop(name) for name in ("model_state_dict", "state_dict") if name in facts), None)
    if state is None:
        state, facts = facts, {}
    state = {name.removeprefix("module."): value for name, value in state.items()}      # of DataParallel
    if "global_encoder.main.0.weight" in state:
        state = translate_published(state)
    return state, facts


def read_input(stated: dict, leads: int) -> dict:
    """MCF.input as a checkpoint states it, which may come from anyone. Raises ValueError, TypeError, KeyError."""
    if stated["kind"] == "minmax":
        return {"kind": "minmax"}
    if stated["kind"] != "compand":
        raise ValueError("the kind of input must be minmax or compand")
    exponent, linear_below, scale = float(stated["exponent"]), float(stated["linear_below"]), list(stated["scale"])
    scale = [float(value) for value in scale]
    if len(scale) != leads or not all(0 < value < math.inf for value in (exponent, linear_below, *scale)):
        raise ValueError("companding needs positive numbers, and a scale of each lead")
    return {"kind": "compand", "exponent": exponent, "linear_below": linear_below, "scale": scale}


def weights_are_finite(model: nn.Module) -> bool:
    """Whether all weights and running statistics are finite. Waits for the device once."""
    return bool(torch.stack([value.isfinite().all() for value in model.state_dict().values()]).all())
