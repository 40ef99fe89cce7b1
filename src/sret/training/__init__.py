"""Training: recipes, the loop, run folders, reports."""
