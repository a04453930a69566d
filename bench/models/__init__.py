"""What the catalogue costs and what it brings."""
