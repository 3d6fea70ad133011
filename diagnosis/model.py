"""The follow-up paper's network: MCF with a head of statements and a head of attributes on its tokens, and the losses.

H, (B, 100, 136), is the global tokens after their MLP and the trend tokens, one above the other. Both heads read H
alone, so that a stored H feeds them; the beat acts through the attention only.

    python -c "from diagnosis.model import Diagnoser; from model import MCF; \\
               print(sum(p.numel() for p in Diagnoser(MCF(), 71, 7).parameters()))"                 # 26450609
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GLOBAL_TOKENS, MCF, find_weights, read_checkpoint, read_input, weights_are_finite
from utils import UserError

KERNEL, BEFORE = 16, 7          # "same": 7 zeros before, 8 after
WIDTH, GROUPS = 128, 32
BLOCKS, HALVING, WIDENING = 16, (1, 7, 13), 12      # blocks of stride 2, and the one that doubles the channels
HEADS = ("resnet", "pooled")
POOLED_HIDDEN = 256
DECODERS = ("global_decoder", "local_decoder", "trend_decoder")


class GroupedConv(nn.Conv1d):
    """A convolution of kernel 16, "same", in groups: (B, in, L) -> (B, out, L / stride).

    On a CPU few channels a group make it slow; products of spectra take half the time, forward and backward.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, KERNEL, stride=stride, groups=GROUPS)

    def plain(self, x):
        return super().forward(F.pad(x, (BEFORE, KERNEL - 1 - BEFORE)))

    def forward(self, x):
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return self.plain(x)
        batch, channels, length = x.shape
        size = -(-(length + KERNEL - 1) // 4) * 4
        x = F.pad(x, (BEFORE, size - length - BEFORE)).view(batch, GROUPS, channels // GROUPS, size)
        spectrum = torch.fft.rfft(x).permute(1, 3, 0, 2)                                    # (groups, f, B, in)
        kernels = torch.fft.rfft(self.weight, n=size).conj()
        kernels = kernels.view(GROUPS, -1, *kernels.shape[1:]).permute(0, 3, 2, 1)          # (groups, f, in, out)
        y = torch.fft.irfft((spectrum @ kernels).permute(2, 0, 3, 1), n=size)[..., :length:self.stride[0]]
        return y.reshape(batch, self.out_channels, -1) + self.bias[:, None]


class HalfDropout(nn.Module):
    """Dropout 0.5. On a CPU one random byte serves an element, an eighth of what nn.Dropout draws."""

    def forward(self, x):
        if not self.training or x.device.type != "cpu":
            return F.dropout(x, 0.5, self.training)
        drawn = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_().view(torch.uint8)
        return x * (drawn[:x.numel()].view(x.shape) % 2 * 2).to(x.dtype)


class Block(nn.Module):
    """Twice [BatchNorm, ReLU, Dropout, convolution] beside the identity; the first block starts with its convolution.

    From (B, inputs, L) to (B, outputs, L / stride).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, is_first: bool):
        super().__init__()
        self.stride, self.added = stride, (outputs - inputs) // 2
        start = [] if is_first else [nn.BatchNorm1d(inputs), nn.ReLU(), HalfDropout()]
        self.unused = nn.BatchNorm1d(inputs) if is_first else None      # the published block owns it all the same
        self.layers = nn.Sequential(*start, GroupedConv(inputs, outputs, stride), nn.BatchNorm1d(outputs), nn.ReLU(),
                                    HalfDropout(), GroupedConv(outputs, outputs))

    def forward(self, x):
        identity = F.max_pool1d(x, 2) if self.stride == 2 else x
        return self.layers(x) + F.pad(identity, (0, 0, self.added, self.added))


class ResNetHead(nn.Module):
    """H (B, 2 hidden, 136) -> logits (B, classes): 681,415 parameters at 71 classes."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.pad = nn.ConstantPad1d((BEFORE, KERNEL - 1 - BEFORE), 0.0)
        self.stem = nn.Sequential(nn.Conv1d(channels, WIDTH, KERNEL), nn.BatchNorm1d(WIDTH), nn.ReLU())
        widths = [WIDTH * (1 + (number >= WIDENING)) for number in range(-1, BLOCKS)]
        self.blocks = nn.Sequential(*(Block(inputs, outputs, 1 + (number in HALVING), number == 0)
                                      for number, (inputs, outputs) in enumerate(zip(widths, widths[1:]))))
        self.norm, self.linear = nn.BatchNorm1d(2 * WIDTH), nn.Linear(2 * WIDTH, classes)

    def forward(self, tokens):
        return self.linear(F.relu(self.norm(self.blocks(self.stem(self.pad(tokens))))).mean(dim=2))


class PooledHead(nn.Module):
    """H (B, 2 hidden, 136) -> logits (B, classes), by mean, deviation, maximum and minimum of the steps.

    Not the paper's: a head that trains in seconds, for what the encoders alone know.
    """

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(4 * channels), nn.Linear(4 * channels, POOLED_HIDDEN), nn.ReLU(),
                                    HalfDropout(), nn.Linear(POOLED_HIDDEN, classes))

    @staticmethod
    def pool(tokens):
        """(B, channels, steps) -> (B, 4 channels), all that the layers see of them."""
        deviation, mean = torch.std_mean(tokens, dim=2)
        return torch.cat([mean, deviation, tokens.amax(2), tokens.amin(2)], dim=1)

    def forward(self, tokens):
        return self.layers(self.pool(tokens))


def build_attribute_head(channels: int, attributes: int) -> nn.Sequential:
    """H (B, 2 hidden, 136) -> attributes (B, attributes)."""
    flat = channels * GLOBAL_TOKENS
    return nn.Sequential(nn.Flatten(), nn.Linear(flat, flat // 10), nn.ReLU(), nn.Linear(flat // 10, flat // 100),
                         nn.ReLU(), nn.Linear(flat // 100, attributes))


class Diagnoser(nn.Module):
    """MCF with the two heads (AD_Class). attributes: 0 for no such head; restores: whether the decoders stay.

    It takes the MCF that it is given. 26,450,609 parameters with 71 classes and 7 attributes.
    """

    def __init__(self, mcf: MCF, classes: int, attributes: int = 0, head: str = "resnet", restores: bool = True):
        super().__init__()
        self.mcf, self.head, self.restores = mcf, head, restores
        if not restores:
            for name in DECODERS:
                setattr(mcf, name, nn.Identity())
        self.class_head = (ResNetHead if head == "resnet" else PooledHead)(2 * mcf.hidden, classes)
        self.attribute_head = build_attribute_head(2 * mcf.hidden, attributes) if attributes else None

    @property
    def input(self) -> dict:
        return self.mcf.input

    @property
    def uncertainty(self) -> str:
        return self.mcf.uncertainty

    @property
    def parts(self) -> tuple:
        return self.mcf.parts

    def encode(self, masked_global, masked_local, trend):
        """Inputs as MCF's -> global tokens (B, hidden, 136), local tokens (B, hidden, 1), trend tokens, as global."""
        mcf = self.mcf
        return (*mcf.cross_attend(mcf.encode_signal(mcf.global_encoder, masked_global),
                                  mcf.encode_signal(mcf.local_encoder, masked_local)),
                mcf.encode_signal(mcf.trend_encoder, trend))

    def restore(self, global_tokens, local_tokens, trend_tokens):
        """Tokens of encode() -> what MCF returns."""
        mcf, both = self.mcf, torch.cat([global_tokens, trend_tokens], dim=1)
        return (mcf.restore_signal(mcf.global_decoder, global_tokens),
                mcf.restore_signal(mcf.local_decoder, local_tokens), mcf.restore_signal(mcf.trend_decoder, both)[0])

    def forward(self, masked_global, masked_local, trend):
        """Inputs as MCF's -> logits (B, classes)."""
        global_tokens, _, trend_tokens = self.encode(masked_global, masked_local, trend)
        return self.class_head(torch.cat([global_tokens, trend_tokens], dim=1))


def asymmetric_loss(logits, labels, gamma_pos: float = 10.0, gamma_neg: float = 4.0, clip: float = 0.05):
    """AsymmetricLoss (Ridnik et al., ICCV 2021), summed over batch and classes; its focal weights are constants.

    logits, labels: (B, classes). A negative's probability counts less by clip. gamma_pos 10 is the published value.
    """
    p = torch.sigmoid(logits)
    right = torch.where(labels == 1, p, (1 - p + clip).clamp(max=1))        # probability given to what is true
    gamma = torch.where(labels == 1, gamma_pos, gamma_neg)
    weight = (1 - right.detach()) ** gamma
    return -(weight * torch.log(right.clamp(min=1e-8))).sum()


def statement_loss(kind: str, logits, labels, gamma_pos: float):
    """The loss of the statements, "asymmetric" or "bce", summed over batch and classes, in float32."""
    if kind == "asymmetric":
        return asymmetric_loss(logits.float(), labels, gamma_pos)
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum")


def attribute_loss(predicted, attributes):
    """Mean squared error of the known attributes: (B, attributes) each, unknown ones NaN."""
    known = attributes.isfinite()
    return ((predicted - attributes.nan_to_num()) * known).square().sum() / known.sum().clamp(min=1)


def load_diagnoser(path) -> tuple:
    """Read a checkpoint of diagnosis/train.py: (network on the CPU, all else that it holds).

    Decoders and attribute head are there where the file has them. Raises UserError.
    """
    content = read_checkpoint(path)
    try:
        state, facts = find_weights(content)
        stem, last = state["mcf.global_encoder.0.weight"], state["mcf.global_encoder.14.weight"]
        mcf = MCF(stem.shape[1], last.shape[0], facts["uncertainty"])
        mcf.input = read_input(facts["input"], mcf.leads)
        attributes = len(state["attribute_head.5.bias"]) if "attribute_head.5.bias" in state else 0
        network = Diagnoser(mcf, len(facts["statements"]), attributes, facts["config"]["head"],
                            any(name.startswith("mcf.global_decoder") for name in state))
        network.load_state_dict(state)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{path} is not a checkpoint of diagnosis.train ({type(error).__name__}); name another one, or "
                        "train it again") from error
    if not weights_are_finite(network):
        raise UserError(f"{path} holds weights that are NaN or infinite; name another checkpoint, or train it again")
    return network, facts
