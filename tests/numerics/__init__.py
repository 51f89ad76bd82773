"""Tests of jaxq.numerics."""
