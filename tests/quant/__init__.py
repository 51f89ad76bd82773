"""Tests of jaxq.quant."""
