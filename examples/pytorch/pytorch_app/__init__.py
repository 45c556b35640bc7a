"""Federated training of a CNN on MNIST with PyTorch."""
