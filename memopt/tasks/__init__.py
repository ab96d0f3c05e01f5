"""What a model answers: the table of tasks, and of each task what is done with its answers."""
