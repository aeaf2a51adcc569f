"""Federated learning over a message broker."""

__version__ = "0.1.0"
