"""H of records, as the heads read it: computed once for frozen encoders, and stored beside the arrays.

    features_KEY.npy    (N, 100, 136) float16, of each row of statements.npy; KEY: of the encoders and the records

The input is not masked, and the beat is the middle one of the valid ones.
"""
import copy
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dataloader import Normalisation, crop_global
from diagnosis.arrays import Statements
from ecg.arrays import load_npy
from ecg.writing import RowWriter
from model import MCF, compute_trend
from scoring.fused import FusedEncoder
from utils import UserError, unwritable

RECORDS_AT_ONCE = 32
CALIBRATION_RECORDS = 512


def beats_and_ecg(statements: Statements, rows: np.ndarray, normalisation: Normalisation) -> tuple:
    """The network's input of some rows, unmasked, with their middle beats: ecg (B, 4800, leads), beat (B, 480, leads).
    """
    records = torch.from_numpy(normalisation.read(statements.records, rows)).to(normalisation.device)
    r_peaks = torch.from_numpy(statements.middle_beats(rows)).to(normalisation.device)
    return (crop_global(normalisation.normalise(records)),
            normalisation.beats(records, torch.arange(len(rows), device=records.device), r_peaks))


class Encoder:
    """The encoders of an MCF in eval mode, BatchNorm folded. It copies the MCF, which stays as it is."""

    @torch.no_grad()
    def __init__(self, mcf: MCF):
        self.mcf = mcf = copy.deepcopy(mcf).eval()
        self.of_global, self.of_local, self.of_trend = (FusedEncoder(encoder, torch.float32) for encoder in (
            mcf.global_encoder, mcf.local_encoder, mcf.trend_encoder))

    @torch.inference_mode()
    def __call__(self, ecg, beat):
        """ecg (B, 4800, leads), beat (B, 480, leads) -> H (B, 2 hidden, 136)."""
        tokens, _ = self.mcf.cross_attend(self.of_global(ecg), self.of_local(beat))
        return torch.cat([tokens, self.of_trend(compute_trend(ecg))], dim=1)

    def iterate(self, statements: Statements, rows: np.ndarray, title: str):
        """Yield H of rows, RECORDS_AT_ONCE at a time, (B, 2 hidden, 136)."""
        normalisation = Normalisation.of(self.mcf.input, next(self.mcf.parameters()).device)
        for start in tqdm(range(0, len(rows), RECORDS_AT_ONCE), desc=title, leave=False):
            yield self(*beats_and_ecg(statements, rows[start:start + RECORDS_AT_ONCE], normalisation))


@torch.no_grad()
def calibrate_norms(mcf: MCF, statements: Statements, rows: np.ndarray):
    """Give random encoders the BatchNorm statistics of some training records: a control without them would be weak."""
    norms = [layer for encoder in (mcf.global_encoder, mcf.local_encoder, mcf.trend_encoder)
             for layer in encoder if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None                            # a plain mean over the batches
    mcf.train()
    normalisation = Normalisation.of(mcf.input, next(mcf.parameters()).device)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, CALIBRATION_RECORDS).astype(int))]
    for start in range(0, len(rows), RECORDS_AT_ONCE):
        ecg, beat = beats_and_ecg(statements, rows[start:start + RECORDS_AT_ONCE], normalisation)
        for encoder, signal in zip((mcf.global_encoder, mcf.local_encoder, mcf.trend_encoder),
                                   (ecg, beat, compute_trend(ecg))):
            mcf.encode_signal(encoder, signal)
    for norm in norms:
        norm.momentum = 0.1
    mcf.eval()


def features_path(data_path, mcf: MCF, statements: Statements) -> Path:
    """Where H of these encoders and records is stored: the name holds a SHA-256 of both."""
    digest = hashlib.sha256(json.dumps([mcf.input, statements.about["fingerprint"]]).encode())
    for name, value in sorted(mcf.state_dict().items()):
        if "decoder" not in name:
            digest.update(value.cpu().contiguous().numpy().tobytes())
    return Path(data_path) / f"features_{digest.hexdigest()[:16]}.npy"


def store_features(data_path, mcf: MCF, statements: Statements) -> np.ndarray:
    """H of all records, (N, 2 hidden, 136) float16, memory-mapped; made on first use. Raises UserError."""
    path = features_path(data_path, mcf, statements)
    if not path.exists():
        part = path.with_suffix(".part")
        try:
            writer, overflow = None, False
            for tokens in Encoder(mcf).iterate(statements, np.arange(len(statements.records)), "H of all records"):
                block = tokens.half().cpu().numpy()
                writer, overflow = writer or RowWriter(part, block.shape[1:], np.float16), overflow or (
                    not np.isfinite(block).all())
                for row in block:
                    writer.append(row)
            writer.finish()
            if overflow:
                raise UserError("H of these encoders leaves the range of float16; use another --encoder")
            os.replace(part, path)
        except OSError as error:
            raise unwritable(path, error) from error
        finally:
            part.unlink(missing_ok=True)
    return load_npy(path)


@torch.inference_mode()
def logits_of(network, statements: Statements, rows: np.ndarray, data_path=None) -> np.ndarray:
    """Logits of rows by a Diagnoser, unmasked, (rows, classes) float32; from the stored H where there is one."""
    network.eval()
    device = next(network.parameters()).device
    path = data_path and features_path(data_path, network.mcf, statements)
    if path and path.exists():
        stored = load_npy(path)
        blocks = (torch.from_numpy(stored[rows[start:start + RECORDS_AT_ONCE]]).to(device).float()
                  for start in range(0, len(rows), RECORDS_AT_ONCE))
    else:
        blocks = Encoder(network.mcf).iterate(statements, rows, "diagnose")
    return np.concatenate([network.class_head(tokens).cpu().numpy() for tokens in blocks])
