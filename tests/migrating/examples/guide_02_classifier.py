# ruff: noqa
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from sparsereg.layers import L0Linear


class SparseClassifier(nn.Module):
    def __init__(self, input_dim, hidden_dim, num_classes, sparsity=0.9):
        super().__init__()
        self.fc1 = L0Linear(input_dim, hidden_dim, init_sparsity=sparsity)
        self.fc2 = L0Linear(hidden_dim, hidden_dim, init_sparsity=sparsity)
        self.fc3 = L0Linear(hidden_dim, num_classes, init_sparsity=sparsity)

    def forward(self, x):
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)

    def get_l0_loss(self):
        l0_loss = 0
        for module in self.modules():
            if hasattr(module, "get_l0_penalty"):
                l0_loss += module.get_l0_penalty()
        return l0_loss


# Create model and optimizer
model = SparseClassifier(784, 256, 10, sparsity=0.95)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

# Training loop
for epoch in range(10):
    for x, y in train_loader:
        # Forward pass
        logits = model(x)

        # Compute losses
        task_loss = F.cross_entropy(logits, y)
        l0_loss = model.get_l0_loss()
        total_loss = task_loss + 1e-3 * l0_loss  # lambda = 0.001

        # Backward pass
        optimizer.zero_grad()
        total_loss.backward()
        optimizer.step()
