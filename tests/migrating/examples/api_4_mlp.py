# ruff: noqa
from sparsereg.layers import SparseMLP
import torch.nn.functional as F

model = SparseMLP(784, 256, 10, init_sparsity=0.8)
optimizer = torch.optim.Adam(model.parameters())

# Training loop
for x, y in dataloader:
    logits = model(x)

    # Task loss + L0 regularization
    task_loss = F.cross_entropy(logits, y)
    l0_loss = model.get_l0_loss()
    total_loss = task_loss + 1e-3 * l0_loss

    optimizer.zero_grad()
    total_loss.backward()
    optimizer.step()

    # Monitor sparsity
    stats = model.get_sparsity_stats()
    print(f"Layer sparsities: {stats}")
