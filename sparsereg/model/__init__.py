"""Networks with gates: no loss, no logging."""
