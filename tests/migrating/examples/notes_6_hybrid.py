# ruff: noqa
from sparsereg import HybridGate

# Combine L0 selection with random sampling
hybrid = HybridGate(
    n_items=10000,
    l0_fraction=0.25,  # 25% from L0
    random_fraction=0.75,  # 75% random
    target_items=1000,
)
selected, indices, types = hybrid.select(data)
