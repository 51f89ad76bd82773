"""Rows of an array by index, zeros where the index is none."""
