"""What the doctor looks at, a check a function."""
