"""The version, written once: pyproject.toml, the native build and the package read it here."""

__version__ = "0.1.0"
