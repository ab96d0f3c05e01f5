"""A durable multimodal memory: store, joint space, retrieval, lifecycle, privacy."""
