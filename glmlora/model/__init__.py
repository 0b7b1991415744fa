"""A model as users hold it: configuration, weights, adapters, device."""
