# ruff: noqa
import torch
import torch.nn.functional as F
from sparsereg.layers import SparseMLP
from sparsereg.penalties import TemperatureScheduler, update_temperatures, PenaltyTracker

# Initialize model and training
model = SparseMLP(784, 256, 10, init_sparsity=0.9, use_l2=True)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
temp_scheduler = TemperatureScheduler(1.0, 0.1, 50)
tracker = PenaltyTracker()

# Training parameters
l0_lambda = 1e-3
l2_lambda = 1e-4

for epoch in range(100):
    # Update temperature
    temp = temp_scheduler.get_temperature(epoch)
    update_temperatures(model, temp)

    for batch_idx, (x, y) in enumerate(train_loader):
        # Forward pass
        logits = model(x)

        # Compute losses
        task_loss = F.cross_entropy(logits, y)
        l0_loss = model.get_l0_loss()
        l2_loss = model.get_l2_loss()

        total_loss = task_loss + l0_lambda * l0_loss + l2_lambda * l2_loss

        # Backward pass
        optimizer.zero_grad()
        total_loss.backward()
        optimizer.step()

        # Track metrics
        tracker.log("task_loss", task_loss.item())
        tracker.log("l0_penalty", l0_loss.item())
        tracker.log("sparsity", list(model.get_sparsity_stats().values())[0]["sparsity"])

    # Print epoch statistics
    stats = model.get_sparsity_stats()
    print(f"Epoch {epoch}: Temp={temp:.3f}")
    for name, layer_stats in stats.items():
        print(f"  {name}: {layer_stats['sparsity']:.1%} sparse, {layer_stats['active_params']:.0f} active")

# After training, prune the model
from sparsereg.layers import prune_model

pruned = prune_model(model, threshold=0.05)
print(f"Final model has {get_active_parameter_count(pruned)} active parameters")
