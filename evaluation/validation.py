"""The AUROC of a split while a network trains."""
from ecg.arrays import load_r_peaks, open_labels, open_records
from evaluation.metrics import detection_auroc
from model import MCF
from scoring.passes import Scorer
from scoring.protocols import Protocol


class Validation:
    """Detection AUROC of a split, "val" or "test", while training."""

    def __init__(self, data_path, split: str, leads: int, protocol: Protocol):
        self.records, self.protocol = open_records(data_path, split, leads), protocol
        self.labels = open_labels(data_path, split, (len(self.records),))
        self.r_peaks = load_r_peaks(data_path, split, self.records, protocol.detector)

    def auroc(self, model: MCF, mask_ratio: int, amp: str, beats: int) -> float:
        """beats: a record, 0 for all."""
        scorer = Scorer(model, self.protocol, mask_ratio, amp)
        scored = scorer.score(self.records, self.r_peaks, beats_per_record=beats or None)
        return detection_auroc(self.labels, scored.scores)
