"""Checks that cost seconds, made before GPU-hours are paid for."""
