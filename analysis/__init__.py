"""What a finished study means. Loads neither torch nor ray, and never unpickles."""
