"""Diagnosis of 71 statements by the encoders of the anomaly network: the follow-up paper, rebuilt on open data.

Not for clinical use. See diagnosis/README.md.
"""
