"""How much attention each key received, without the attention weights."""
