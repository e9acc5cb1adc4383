"""Reading the study folder of a stranger: its files, its tables, its place."""
