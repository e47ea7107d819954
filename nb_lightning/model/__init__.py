"""The backbone: transformer, attention, adapters, weights, and how it is laid out over devices."""
