# ruff: noqa
from sparsereg.layers import L0Linear
from sparsereg.penalties import compute_l0l2_penalty


class L0L2Model(nn.Module):
    def __init__(self):
        super().__init__()
        # Enable L2 penalty computation
        self.fc1 = L0Linear(100, 50, use_l2=True, init_sparsity=0.8)
        self.fc2 = L0Linear(50, 25, use_l2=True, init_sparsity=0.8)
        self.fc3 = L0Linear(25, 10, use_l2=True, init_sparsity=0.8)

    def forward(self, x):
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


model = L0L2Model()
optimizer = torch.optim.Adam(model.parameters())

# Training with L0L2
for x, y in train_loader:
    logits = model(x)

    # Task loss
    task_loss = F.cross_entropy(logits, y)

    # Combined L0L2 penalty
    penalty = compute_l0l2_penalty(
        model,
        l0_lambda=1e-3,  # L0 weight
        l2_lambda=1e-4,  # L2 weight
    )

    total_loss = task_loss + penalty

    optimizer.zero_grad()
    total_loss.backward()
    optimizer.step()
