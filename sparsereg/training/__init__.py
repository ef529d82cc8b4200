"""Training under Lightning: the module, its callbacks, checkpoints, and how a run is built."""

from sparsereg.extras import need

need("train", "pytorch_lightning", "hydra", "omegaconf", "torchmetrics")
