"""Sparse matrices and the products with them."""
