"""Measurements on the system's own parts: no second implementation."""
