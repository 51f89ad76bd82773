"""prefill_attention: many new queries, tile by tile; what keys receive."""
