"""The ServerApp, the command line and the experiments: ``python -m simulations --help``."""
