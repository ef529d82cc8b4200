# ruff: noqa
from sparsereg.penalties import TemperatureScheduler, update_temperatures

# Create temperature scheduler
scheduler = TemperatureScheduler(
    initial_temp=2.0,  # Start with soft gates
    final_temp=0.1,  # End with hard gates
    anneal_epochs=50,  # Anneal over 50 epochs
)

# Training with temperature annealing
model = SparseMLP(784, 256, 10, init_sparsity=0.9)
optimizer = torch.optim.Adam(model.parameters())

for epoch in range(100):
    # Update temperature
    temp = scheduler.get_temperature(epoch)
    update_temperatures(model, temp)

    print(f"Epoch {epoch}: Temperature = {temp:.3f}")

    # Training loop
    for x, y in train_loader:
        # ... training step ...
        pass
