# ruff: noqa
from sparsereg.gates import SampleGate

# Select ~100 samples from 1000
gate = SampleGate(n_samples=1000, target_samples=100)

# Select samples
data = torch.randn(1000, 50)
selected_data, indices = gate.select_samples(data)
print(f"Selected {len(indices)} samples")
