"""decode_attention: a few new queries against a long, stored cache."""
