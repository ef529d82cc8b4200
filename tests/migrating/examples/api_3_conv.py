# ruff: noqa
from sparsereg.layers import L0Conv2d

# Channel-wise structured sparsity
conv = L0Conv2d(
    in_channels=64,
    out_channels=128,
    kernel_size=3,
    structured=True,  # Prune entire channels
    init_sparsity=0.7,
)

x = torch.randn(8, 64, 32, 32)
output = conv(x)  # Shape: (8, 128, 30, 30)
