"""A durable multimodal memory: store, joint space, retrieval, lifecycle, privacy."""

from memopt.extras import require

require("pyarrow", extra="memory", why="keep a memory")
