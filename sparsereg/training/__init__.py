"""Training under Lightning: the module, its callbacks, checkpoints, and how a run is built."""
