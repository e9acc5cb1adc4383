"""Inference over configurations: pairs, intervals, tests, verdicts, plans."""
