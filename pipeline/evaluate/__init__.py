"""Held-out loss, generation and exact match."""
