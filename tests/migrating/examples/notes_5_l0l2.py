# ruff: noqa
from sparsereg import compute_l0l2_penalty

# Combine L0 (sparsity) with L2 (regularization)
penalty = compute_l0l2_penalty(
    model,
    l0_lambda=1e-3,  # Sparsity strength
    l2_lambda=1e-4,  # Weight regularization
)
loss = task_loss + penalty
