"""Ray, on this machine or on many."""
