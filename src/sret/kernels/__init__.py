"""How a product, an attention or a chain of passes is computed on a device; the formulas are in `sret.layers`."""
