"""Federated logistic regression on tumor data with NumPy."""
