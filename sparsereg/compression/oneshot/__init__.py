"""A smaller network without training: what goes, and what stays repaired by least squares."""
