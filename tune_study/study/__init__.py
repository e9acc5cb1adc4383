"""Many trials: planned, checked, run, continued."""
