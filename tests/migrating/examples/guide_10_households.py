# ruff: noqa
from sparsereg.gates import HybridGate
import torch


class HouseholdCalibrator:
    """
    Use L0 regularization for household weight calibration
    in PolicyEngine's CPS enhancement.
    """

    def __init__(self, n_households, target_households=50000):
        # Hybrid selection: some via L0, some random
        self.selector = HybridGate(
            n_items=n_households,
            l0_fraction=0.25,  # 25% selected by importance
            random_fraction=0.75,  # 75% random for diversity
            target_items=target_households,
            temperature=0.25,  # PolicyEngine default
        )

    def calibrate_weights(self, household_data, population_targets):
        """
        Select and reweight households to match population targets.
        """
        # Select households
        selected_data, indices, selection_type = self.selector.select(household_data)

        # Separate L0 and random selections
        l0_mask = selection_type == "l0"
        random_mask = selection_type == "random"

        # Apply different weight adjustments
        weights = torch.ones(len(indices))
        weights[l0_mask] *= 1.2  # Higher weight for L0-selected
        weights[random_mask] *= 0.9  # Lower weight for random

        # Normalize to match targets
        weights = weights * (population_targets.sum() / weights.sum())

        return selected_data, weights, indices

    def optimize_selection(self, loss_fn):
        """
        Optimize household selection based on calibration loss.
        """
        optimizer = torch.optim.Adam(self.selector.parameters(), lr=0.01)

        for _ in range(100):
            # Get current selection
            penalty = self.selector.l0_gate.get_penalty()

            # Compute calibration loss
            calib_loss = loss_fn()

            # Combined objective
            total_loss = calib_loss + 1e-4 * penalty

            optimizer.zero_grad()
            total_loss.backward()
            optimizer.step()


# Usage in PolicyEngine context
n_households = 200000  # Full CPS
target_households = 50000  # Enhanced subset

calibrator = HouseholdCalibrator(n_households, target_households)

# Household data (from CPS)
household_data = torch.randn(n_households, 100)  # Features
population_targets = torch.tensor([1e8])  # US population

# Calibrate
selected, weights, indices = calibrator.calibrate_weights(household_data, population_targets)

print(f"Selected {len(indices)} households")
print(f"Average weight: {weights.mean():.2f}")
print(f"Weight range: [{weights.min():.2f}, {weights.max():.2f}]")
