"""A study's folder, here or behind a URI: the one contract with ``analysis``."""
