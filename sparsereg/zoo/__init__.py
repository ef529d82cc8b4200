"""From the names of a configuration to networks."""
