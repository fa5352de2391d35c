"""secure-export: locate, purify and verify a classifier; release only the files that were measured."""

__version__ = "0.1.0"
