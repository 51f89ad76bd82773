"""Tests of jaxq, one folder per package."""
