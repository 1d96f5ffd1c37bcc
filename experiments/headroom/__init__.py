"""What is left to gain: the best schedules that a search finds for each task, beside tuned cosine."""
