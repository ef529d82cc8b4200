# ruff: noqa
from sparsereg.layers import prune_model

# Prune weights with activation probability < 0.05
pruned_model = prune_model(model, threshold=0.05)

# Pruned weights are set to exactly 0
# Model can be saved with sparse storage
