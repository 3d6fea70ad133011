"""From a network to anomaly scores and maps: the protocols, the masked passes, the network in its fast form.

A higher score is more anomalous everywhere.
"""
