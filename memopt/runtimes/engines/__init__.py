"""The engines of tasks other than one dense vector: one file and one clear verb each."""
