"""Image+prompt sets, observers, recipes, the quantisation plan and the PyTorch baselines."""
