"""Federated logistic regression on handwritten digits with scikit-learn."""
