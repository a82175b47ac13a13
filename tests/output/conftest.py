"""Fixtures of several modules here."""

from .faults import fault_points

__all__ = ["fault_points"]
