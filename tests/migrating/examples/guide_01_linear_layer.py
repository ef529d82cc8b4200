# ruff: noqa
import torch
from sparsereg.layers import L0Linear

# Create a sparse linear layer
layer = L0Linear(
    in_features=100,
    out_features=50,
    temperature=0.5,
    init_sparsity=0.8,  # Start with 80% sparsity
)

# Forward pass
x = torch.randn(32, 100)
output = layer(x)

# Get L0 penalty for regularization
l0_penalty = layer.get_l0_penalty()
print(f"Active parameters: {l0_penalty.item():.0f}")
print(f"Sparsity: {layer.get_sparsity():.2%}")
