"""The version of the package, in one place (pyproject.toml reads it without importing)."""

__version__ = "0.1.0"
