# ruff: noqa
import torch
import torch.nn as nn
import torch.nn.functional as F
from sparsereg.layers import L0Conv2d, L0Linear


class SparseCNN(nn.Module):
    def __init__(self, num_classes=10, init_sparsity=0.8):
        super().__init__()
        # Convolutional layers with L0
        self.conv1 = L0Conv2d(3, 32, kernel_size=3, init_sparsity=init_sparsity)
        self.conv2 = L0Conv2d(32, 64, kernel_size=3, init_sparsity=init_sparsity)
        self.conv3 = L0Conv2d(64, 128, kernel_size=3, init_sparsity=init_sparsity)

        # Pooling
        self.pool = nn.MaxPool2d(2, 2)

        # Fully connected layers with L0
        self.fc1 = L0Linear(128 * 3 * 3, 256, init_sparsity=init_sparsity)
        self.fc2 = L0Linear(256, num_classes, init_sparsity=init_sparsity)

    def forward(self, x):
        # Conv block 1
        x = F.relu(self.conv1(x))
        x = self.pool(x)

        # Conv block 2
        x = F.relu(self.conv2(x))
        x = self.pool(x)

        # Conv block 3
        x = F.relu(self.conv3(x))
        x = self.pool(x)

        # Classifier
        x = x.view(x.size(0), -1)
        x = F.relu(self.fc1(x))
        x = self.fc2(x)
        return x

    def get_total_sparsity(self):
        total_params = 0
        active_params = 0

        for module in self.modules():
            if hasattr(module, "get_l0_penalty"):
                penalty = module.get_l0_penalty().item()
                active_params += penalty

                # Calculate total parameters
                if hasattr(module, "weight"):
                    total_params += module.weight.numel()

        return 1 - (active_params / total_params)


# Example usage
model = SparseCNN(num_classes=10, init_sparsity=0.9)
print(f"Initial model sparsity: {model.get_total_sparsity():.2%}")
