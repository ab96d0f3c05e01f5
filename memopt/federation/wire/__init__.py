"""What crosses the network: the messages, and a bad network for tests."""
