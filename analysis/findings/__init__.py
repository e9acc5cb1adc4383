"""Everything the report says, computed once: tables, decisions, the JSON summaries."""
