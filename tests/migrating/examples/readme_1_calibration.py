# ruff: noqa
import numpy as np
from scipy import sparse as sp
from sparsereg.calibration import SparseCalibrationWeights

# Setup: Q targets, N households
Q, N = 200, 10000
M = sp.random(Q, N, density=0.3, format="csr")  # Household characteristics
y = np.random.uniform(1e6, 1e8, size=Q)  # Population targets
# Initialize model
model = SparseCalibrationWeights(
    n_features=N,
    beta=0.35,
    gamma=-0.1,
    zeta=1.1,
    init_keep_prob=0.5,  # Start with 50% active probability
    init_weights=1.0,  # Or pass array of initial weights
    log_weight_jitter_sd=0.05,
    device="cuda",  # GPU acceleration
)
# Train with L0+L2 regularization
model.fit(
    M=M,
    y=y,
    lambda_l0=1e-6,  # Controls sparsity level
    lambda_l2=1e-8,  # Prevents weight explosion
    lr=0.15,
    epochs=2000,
    loss_type="relative",  # Scale-invariant loss
    verbose=True,
    verbose_freq=100,
)
# Get results
active = model.get_active_weights()
print(f"Selected {active['count']} of {N} households ({100 * active['count'] / N:.1f}%)")
print(f"Sparsity: {model.get_sparsity():.1%}")
# Predict calibrated totals
y_pred = model.predict(M)
