"""How a number, a table and a chapter are written: words, layout, LaTeX."""
