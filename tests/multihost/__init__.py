"""Tests with several processes on loopback."""
