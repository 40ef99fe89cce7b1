"""Models of timm: their configuration, and the interface by which `SReT` is one of them."""
