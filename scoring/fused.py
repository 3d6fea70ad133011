"""The network as scoring runs it: the same function of the same weights in eval mode, in fewer and faster steps.

BatchNorm folds into the convolutions. A transposed convolution of kernel 4 and stride 2 is a plain one of kernel 2 with
twice the channels, whose output, read in order, is already interleaved. Of the trend decoder's first layer, which is
linear, the trend's half is computed once a record. Convolutions of kernel 15 are products of spectra on a CPU.
tests/test_scoring.py holds it to the plain network.
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn

from model import GLOBAL_LENGTH, GLOBAL_TOKENS, MCF, TOKEN_KERNEL, WIDTHS

FEATURES = GLOBAL_LENGTH // 2 ** len(WIDTHS)        # samples of a recording beside the tokens


def fold_norm(norm: nn.BatchNorm2d | None, outputs: int) -> tuple:
    """What BatchNorm in eval mode does after a convolution: factor (outputs,) and offset (outputs,)."""
    if norm is None:
        return torch.ones(outputs), torch.zeros(outputs)
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return factor, norm.bias - norm.running_mean * factor


def frozen(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A convolution's weight (out, in, 1, kernel) for inference, channels last in memory."""
    return weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)


class TokenConvolution:
    """The convolution of kernel 15 between features and tokens, without its offset.

    From (B, in, 1, samples) to (B, out, 1, samples - 14); widening, as a transposed convolution does, to samples + 14
    with a zero at either end. Of a recording's 150 features, on a CPU, spectra take half the time.
    """

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, widening: bool):
        """weight: (out, in, 1, 15), as a plain convolution's."""
        self.weight, self.widening = frozen(weight, dtype), widening
        spectrum = torch.fft.rfft((weight.flip(3) if widening else weight)[:, :, 0].float(), n=FEATURES)
        self.spectrum = (spectrum if widening else spectrum.conj()).permute(2, 1, 0).contiguous()   # (76, in, out)

    def __call__(self, x, part: slice = slice(None)):
        """part: which of the input channels x holds."""
        long = x.shape[3] == (GLOBAL_TOKENS if self.widening else FEATURES)
        if not (long and x.device.type == "cpu" and x.dtype == torch.float32):
            return F.conv2d(x, self.weight[:, part], padding=(0, TOKEN_KERNEL * self.widening))
        spectrum = torch.fft.rfft(x[:, :, 0].transpose(1, 2), n=FEATURES, dim=1).transpose(0, 1)    # (76, B, in)
        product = (spectrum @ self.spectrum[:, part]).transpose(0, 1)                               # (B, 76, out)
        y = torch.fft.irfft(product, n=FEATURES, dim=1)
        y = F.pad(y, (0, 0, 1, 1)) if self.widening else y[:, :GLOBAL_TOKENS]
        return y.transpose(1, 2).unsqueeze(2)


class FusedEncoder:
    """Computes what build_encoder's layers compute: (B, samples, leads) -> tokens (B, hidden, tokens)."""

    def __init__(self, encoder: nn.Sequential, dtype: torch.dtype):
        layers, self.steps, self.dtype = list(encoder), [], dtype
        self.to_tokens = TokenConvolution(layers[-1].weight, dtype, widening=False)
        for layer, following in zip(layers, layers[1:]):
            if isinstance(layer, nn.Conv2d):
                norm = following if isinstance(following, nn.BatchNorm2d) else None
                factor, offset = (part.to(layer.weight.device) for part in fold_norm(norm, layer.out_channels))
                weight = frozen(layer.weight * factor[:, None, None, None], dtype)
                self.steps.append((weight, offset.detach().to(dtype)))

    def __call__(self, signal):
        x = signal.to(self.dtype).transpose(1, 2).unsqueeze(2)              # (B, leads, 1, samples), channels last
        for weight, offset in self.steps:
            x = F.leaky_relu_(F.conv2d(x, weight, offset, stride=(1, 2), padding=(0, 1)), 0.2)
        return self.to_tokens(x).squeeze(2)


class FusedDecoder:
    """Computes what build_decoder's layers compute, from tokens (B, hidden, tokens) to (B, samples, channels).

    Between the layers x is (B, channels, 1, samples + 2) with a zero at either end, the next layer's padding. The last
    layer, the log-variance's, is float32 as in training.
    """

    def __init__(self, decoder: nn.Sequential, dtype: torch.dtype):
        self.dtype = dtype
        layers = [layer for layer in decoder if isinstance(layer, (nn.ConvTranspose2d, nn.BatchNorm2d))]
        factor, offset = fold_norm(layers[1], layers[0].out_channels)
        # of stride 1, so a plain convolution with the kernel reversed
        first = layers[0].weight.transpose(0, 1).flip(3) * factor[:, None, None, None]
        self.from_tokens = TokenConvolution(first, dtype, widening=True)
        self.first_offset, self.steps = offset.detach().to(dtype), []
        for position in range(2, len(layers), 2):
            weight = layers[position].weight.transpose(0, 1)                        # (out, in, 1, 4)
            norm = layers[position + 1] if position + 1 < len(layers) else None
            factor, offset = (part.to(weight.device) for part in fold_norm(norm, len(weight)))
            weight = weight * factor[:, None, None, None]
            # outputs 2u-1 and 2u both see inputs u-1 and u, the odd one by taps 2 and 0, the even one by 3 and 1
            pair = torch.cat([weight[..., [2, 0]], weight[..., [3, 1]]])
            own = torch.float32 if norm is None else dtype
            self.steps.append((frozen(pair, own), offset.detach().to(own).repeat(2)))

    def start(self, tokens, part: slice = slice(None)):
        """The first layer without its offset, for the token channels in part: linear, so parts of it add up."""
        return self.from_tokens(tokens.to(self.dtype).unsqueeze(2), part)

    def finish(self, x):
        """From the first layer's output to that of the last one, before Tanh."""
        x = pad_ends(F.relu_(x + self.first_offset[:, None, None]))
        for position, (weight, offset) in enumerate(self.steps):
            x = F.conv2d(x.to(weight.dtype), weight, offset)                        # (B, 2 channels, 1, samples + 1)
            batch, double, _, windows = x.shape
            x = x.permute(0, 2, 3, 1).reshape(batch, 1, 2 * windows, double // 2)
            if position + 1 < len(self.steps):
                x = pad_ends(F.relu_(x.permute(0, 3, 1, 2)))
        return x[:, 0, 1:-1]

    def __call__(self, tokens):
        return self.finish(self.start(tokens))


def pad_ends(x):
    """Set the first and the last sample of (B, channels, 1, samples) to 0, in place."""
    x[..., 0], x[..., -1] = 0, 0
    return x


def leave_out(signal):
    """The encoder of a part that the network does not have: no tokens, as MCF.encode_signal gives."""


class FusedMCF:
    """MCF in eval mode, for scoring; its convolutions compute in dtype, all else in float32.

    It copies the weights, and leaves the model as it is: make it anew after a training step.
    """

    @torch.no_grad()
    def __init__(self, model: MCF, dtype: torch.dtype = torch.float32):
        self.model = model = copy.deepcopy(model).eval()
        self.encode_global, self.encode_local, self.encode_trend = (
            leave_out if encoder is None else FusedEncoder(encoder, dtype)
            for encoder in (model.global_encoder, model.local_encoder, model.trend_encoder))
        self.global_decoder, self.local_decoder, self.trend_decoder = (
            None if decoder is None else FusedDecoder(decoder, dtype)
            for decoder in (model.global_decoder, model.local_decoder, model.trend_decoder))

    def begin_trend(self, trend_tokens):
        """The trend's share of the trend decoder's first layer, for restore(): once a record."""
        if self.trend_decoder is not None:
            return self.trend_decoder.start(trend_tokens, slice(-self.model.hidden, None))

    def restore_local(self, global_tokens, local_tokens):
        """Of what restore() gives, the local branch's share alone: a tenth of the work."""
        if local_tokens is not None:
            of_record = None if global_tokens is None else global_tokens.float()
            _, local_tokens = self.model.cross_attend(of_record, local_tokens.float())
            return self.model.read_output(self.local_decoder(local_tokens))

    def restore(self, global_tokens, local_tokens, trend_begun):
        """Tokens of n beats and their records (n, hidden, 136), (n, hidden, 1), begin_trend's output: MCF's outputs."""
        global_tokens, local_tokens = self.model.cross_attend(
            *(None if tokens is None else tokens.float() for tokens in (global_tokens, local_tokens)))
        of_trend = trend_begun
        if trend_begun is not None and global_tokens is not None:
            of_trend = trend_begun + self.trend_decoder.start(global_tokens, slice(self.model.hidden))
        read = self.model.read_output
        return (None if global_tokens is None else read(self.global_decoder(global_tokens)),
                None if local_tokens is None else read(self.local_decoder(local_tokens)),
                None if of_trend is None else read(self.trend_decoder.finish(of_trend))[0])
