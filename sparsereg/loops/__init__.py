"""Sparsity in training loops of your own: plain PyTorch, Lightning, Hugging Face."""
