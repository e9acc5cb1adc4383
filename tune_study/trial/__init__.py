"""One trial, from its configuration to its results.json; no Ray in here."""
