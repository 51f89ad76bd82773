"""Tests of jaxq.kvcache."""
