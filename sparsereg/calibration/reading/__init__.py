"""From files to a problem: tables, conditions, matrices, a synthetic survey."""
