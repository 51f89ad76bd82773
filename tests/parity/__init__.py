"""Live comparisons with independent implementations."""
