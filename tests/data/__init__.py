"""Tests of jaxq.data."""
