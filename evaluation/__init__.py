"""Tasks and how answers are scored."""
