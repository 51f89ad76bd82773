"""Tests of jaxq.tokens."""
