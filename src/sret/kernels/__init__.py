"""Fast computation of linear layers, attention and recursions, with fallbacks; the formulas are in `sret.layers`."""
