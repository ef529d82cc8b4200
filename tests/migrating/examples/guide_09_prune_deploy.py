# ruff: noqa
from sparsereg.layers import prune_model
from sparsereg.penalties import get_sparsity_stats
import torch

# Train model with L0
model = SparseCNN(num_classes=10, init_sparsity=0.95)
# ... training loop ...

# Evaluate sparsity
stats = get_sparsity_stats(model)
for name, layer_stats in stats.items():
    print(f"{name}: {layer_stats['sparsity']:.1%} sparse")

# Prune model for deployment
model.eval()
pruned_model = prune_model(model, threshold=0.05)

# Count parameters
total_params = sum(p.numel() for p in model.parameters())
active_params = sum((p != 0).sum().item() for p in pruned_model.parameters())

print(f"Compression ratio: {total_params / active_params:.1f}x")
print(f"Model size reduction: {(1 - active_params / total_params):.1%}")

# Save pruned model
torch.save(
    {
        "model_state_dict": pruned_model.state_dict(),
        "sparsity_stats": stats,
    },
    "pruned_model.pt",
)

# Load for inference
checkpoint = torch.load("pruned_model.pt")
inference_model = SparseCNN(num_classes=10)
inference_model.load_state_dict(checkpoint["model_state_dict"])
inference_model.eval()
