"""Pages that are complete in themselves: one HTML file, its style, its script and its pictures inside."""
