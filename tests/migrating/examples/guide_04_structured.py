# ruff: noqa
from sparsereg.layers import L0Conv2d


class StructuredSparseCNN(nn.Module):
    def __init__(self):
        super().__init__()
        # Use structured=True for channel-wise sparsity
        self.conv1 = L0Conv2d(
            3,
            64,
            kernel_size=3,
            structured=True,  # Prune entire channels
            init_sparsity=0.5,
        )
        self.conv2 = L0Conv2d(64, 128, kernel_size=3, structured=True, init_sparsity=0.6)
        self.conv3 = L0Conv2d(128, 256, kernel_size=3, structured=True, init_sparsity=0.7)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.relu(self.conv3(x))
        return x

    def get_active_channels(self):
        """Count active channels in each layer."""
        active = {}
        for name, module in self.named_modules():
            if isinstance(module, L0Conv2d) and module.structured:
                gates = module.channel_gates.get_active_prob()
                active[name] = (gates > 0.5).sum().item()
        return active


model = StructuredSparseCNN()
print("Active channels per layer:", model.get_active_channels())
