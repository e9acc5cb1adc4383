"""The text of the report: a chapter a file, the page they make, and its two forms."""
