"""Federated fine-tuning of a transformer: only LoRA adapters travel."""
