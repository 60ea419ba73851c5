"""memformer: associative memories as sequence models, in JAX."""

__version__ = "0.1.0"
