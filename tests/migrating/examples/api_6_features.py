# ruff: noqa
from sparsereg.gates import FeatureGate

# Select up to 10 features from 100
gate = FeatureGate(n_features=100, max_features=10)

# Feature selection with names
data = torch.randn(50, 100)
feature_names = [f"feat_{i}" for i in range(100)]

selected_data, selected_names = gate.select_features_with_names(data, feature_names)
print(f"Selected features: {selected_names}")

# Get feature importance
importance = gate.get_feature_importance()
top_10 = torch.topk(importance, 10)
