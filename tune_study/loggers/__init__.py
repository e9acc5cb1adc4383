"""Who listens while it runs."""
