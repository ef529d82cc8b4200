# ruff: noqa
# Process large datasets in batches
def batch_feature_selection(X, feature_names, batch_size=10000):
    feature_gate = FeatureGate(X.shape[1], max_features=20)
    feature_gate.eval()

    selected_features = []
    for i in range(0, len(X), batch_size):
        batch = X[i : i + batch_size]
        selected, names = feature_gate.select_features_with_names(batch, feature_names)
        selected_features.append(selected)

    return torch.cat(selected_features, dim=0)
