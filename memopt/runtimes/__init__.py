"""Run a variant on whatever the device has, falling back to the next provider when one fails."""
