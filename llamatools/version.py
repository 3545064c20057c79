"""The version of the package, and of the `llamatools.*` keys it writes."""

__version__ = "0.1.0"
