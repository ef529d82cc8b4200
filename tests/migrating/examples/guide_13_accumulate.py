# ruff: noqa
# Use gradient accumulation for large models
accumulation_steps = 4
model = SparseCNN(init_sparsity=0.95)
optimizer = torch.optim.Adam(model.parameters())

for i, (x, y) in enumerate(train_loader):
    output = model(x)
    loss = F.cross_entropy(output, y)
    loss = loss / accumulation_steps
    loss.backward()

    if (i + 1) % accumulation_steps == 0:
        optimizer.step()
        optimizer.zero_grad()
