"""An app of Flower's older API: a network on handwritten digits with PyTorch."""
