"""Federated logistic regression on tumour data with NumPy."""
