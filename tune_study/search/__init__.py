"""Optuna suggests."""
