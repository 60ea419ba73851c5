"""Flax NNX layers: the memories with their projections and gates, feedforward layers, norms, positions."""
