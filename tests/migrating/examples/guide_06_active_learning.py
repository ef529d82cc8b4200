# ruff: noqa
from sparsereg.gates import SampleGate
import torch


class ActiveLearner:
    def __init__(self, n_samples, n_select, model):
        self.sample_gate = SampleGate(n_samples=n_samples, target_samples=n_select, temperature=0.3)
        self.model = model

    def select_samples(self, X, y=None):
        """Select most informative samples."""
        self.sample_gate.eval()

        # Get model predictions for uncertainty
        with torch.no_grad():
            outputs = self.model(X)
            probs = F.softmax(outputs, dim=-1)
            entropy = -(probs * probs.log()).sum(dim=-1)

        # Weight samples by uncertainty
        selected_X, selected_entropy, indices = self.sample_gate.select_weighted_samples(X, entropy)

        return selected_X, indices

    def update_selection(self, X, y, selected_indices):
        """Update gate parameters based on selection performance."""
        optimizer = torch.optim.Adam(self.sample_gate.parameters(), lr=0.01)

        # Train on selected samples
        selected_X = X[selected_indices]
        selected_y = y[selected_indices]

        # ... train model on selected samples ...

        # Update gates based on performance
        penalty = self.sample_gate.get_penalty()
        loss = penalty  # Minimize number of samples

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# Example usage
n_samples = 10000
model = SparseClassifier(784, 256, 10)
learner = ActiveLearner(n_samples, n_select=1000, model=model)

X = torch.randn(n_samples, 784)
selected_X, indices = learner.select_samples(X)
print(f"Selected {len(indices)} samples for labeling")
