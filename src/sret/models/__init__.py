"""The models: configuration, architecture, named variants, cost."""
