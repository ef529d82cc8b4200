"""From a problem to weights: losses, products, selection, refit."""
