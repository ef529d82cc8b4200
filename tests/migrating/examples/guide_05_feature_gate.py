# ruff: noqa
from sparsereg.gates import FeatureGate
import pandas as pd
import torch

# Load tabular data
df = pd.read_csv("data.csv")
feature_names = df.columns[:-1].tolist()
X = torch.tensor(df.iloc[:, :-1].values, dtype=torch.float32)
y = torch.tensor(df.iloc[:, -1].values, dtype=torch.long)

# Create feature selection gate
feature_gate = FeatureGate(
    n_features=len(feature_names),
    max_features=10,  # Select at most 10 features
    temperature=0.2,
)

# Train feature selection
optimizer = torch.optim.Adam(feature_gate.parameters(), lr=0.01)

for epoch in range(100):
    # Select features
    selected_X, selected_names = feature_gate.select_features_with_names(X, feature_names)

    # Use selected features for downstream task
    # ... (train classifier on selected_X)

    # Optimize feature selection
    penalty = feature_gate.get_penalty()
    target_loss = (penalty - 10) ** 2  # Target 10 features

    optimizer.zero_grad()
    target_loss.backward()
    optimizer.step()

# Get final selected features
feature_gate.eval()
importance = feature_gate.get_feature_importance()
top_features = [feature_names[i] for i in torch.topk(importance, 10).indices]
print(f"Selected features: {top_features}")
