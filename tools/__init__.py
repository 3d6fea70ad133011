"""Scripts of their own beside the six of the paper: python -m tools.NAME.

synthetic makes simulated ECGs, benchmark measures speed, score_recordings scores recordings of one's own.
"""
