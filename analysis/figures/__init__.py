"""What is drawn of the findings, and how every figure looks."""
