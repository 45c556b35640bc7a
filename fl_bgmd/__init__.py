"""Byzantine-robust federated learning for Flower: rules, attacks, data and models.

The strategies for Flower apps live in :mod:`fl_bgmd.strategies`.
"""

__version__ = "0.1.0"
