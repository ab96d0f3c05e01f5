"""The end that trains or uses the weights: its state, its connection, push and pull."""
