"""Rows of text -> the batches of each rank."""
