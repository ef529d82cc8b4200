# ruff: noqa
from sparsereg import HardConcrete
from microcalibrate import Calibration

# L0 gates for household selection
gates = HardConcrete(
    len(household_weights),
    temperature=0.25,
    init_mean=0.999,  # Start with most households
)
# Use in calibration
# microcalibrate applies gates during weight optimization
