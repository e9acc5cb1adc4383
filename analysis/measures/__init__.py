"""What was measured, as tables: memory, curves, convergence, Pareto sets, a search."""
