"""Exact decisions: branch and bound, input splitting, LP and MILP suggestions, the cascade, and certificates."""
