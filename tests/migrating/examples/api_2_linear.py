# ruff: noqa
from sparsereg.layers import L0Linear

# Create sparse linear layer
layer = L0Linear(784, 256, init_sparsity=0.9)

# Forward pass
x = torch.randn(32, 784)
output = layer(x)  # Shape: (32, 256)

# Get penalties
l0_penalty = layer.get_l0_penalty()
l2_penalty = layer.get_l2_penalty()  # If use_l2=True
