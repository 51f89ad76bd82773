"""Tests of what the benchmarks compute; they measure nothing."""
