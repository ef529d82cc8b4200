# ruff: noqa
# Check CUDA availability
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Move model to GPU
model = SparseMLP(784, 256, 10).to(device)

# Training on GPU
for x, y in train_loader:
    x, y = x.to(device), y.to(device)
    output = model(x)
    # ... rest of training ...
