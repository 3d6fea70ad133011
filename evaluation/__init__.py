"""From scores to the report: the splits that are scored, scores without a network, metrics, numbers, tables, figures.

Recordings of one's own are scored and drawn here too.
"""
