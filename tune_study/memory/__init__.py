"""The bytes of a step."""
