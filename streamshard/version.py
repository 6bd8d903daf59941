"""The version, alone: engine and command line need it and must not import the package's face."""

__version__ = "0.1.0"
