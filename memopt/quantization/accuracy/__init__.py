"""What a quantized graph is compared with, how, and what is said of it."""
