"""Pallas kernels, one folder per operation; plain arrays in and out."""
