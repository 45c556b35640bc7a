"""The app of ``python -m benchmarks.deployed``."""
