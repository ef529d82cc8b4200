# ruff: noqa
from sparsereg.distributions import HardConcrete

# Create gates for a weight matrix
gates = HardConcrete(256, 128, temperature=0.3, init_mean=0.8)

# Sample gates
z = gates()  # Shape: (256, 128)

# Get L0 penalty for loss
penalty = gates.get_penalty()  # Scalar tensor

# Check sparsity
sparsity = gates.get_sparsity()  # Float between 0 and 1
