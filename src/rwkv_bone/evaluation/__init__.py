"""A model's answers to a benchmark's questions, counted: tasks, answers that are kept, scores with their intervals."""
