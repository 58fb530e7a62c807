"""Optimisation models of networks as plain arrays (or Pyomo models). Nothing here solves anything."""
