"""Which units of a network can go, and what goes with them, read off its exported graph."""
