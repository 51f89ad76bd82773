"""Tests of jaxq.eval."""
