"""Tests of jaxq.io."""
