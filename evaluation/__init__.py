"""From scores to the report: the splits that are scored, trivial scores, metrics, numbers, tables and figures.

Nothing here runs the network.
"""
