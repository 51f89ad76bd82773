"""Tests of jaxq.decode."""
