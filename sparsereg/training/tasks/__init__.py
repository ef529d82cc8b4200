"""What a network learns: the loss of a task, its figures, and how a batch and an answer are read."""
