"""Base and adapter in memory, and the loss."""
