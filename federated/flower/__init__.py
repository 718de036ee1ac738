"""Federated merging on Flower: a strategy around `merge_round`, a ServerApp and a ClientApp for `flwr run`.

The maths is in `federated`; these modules turn messages into replies and back. They need the extra:
pip install 'mergesolve[flower]'.
"""
