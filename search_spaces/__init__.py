"""What is tried: grids as Tune param_spaces, and the same knobs as a search space."""
