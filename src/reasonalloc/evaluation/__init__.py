"""Running arms on tasks, grading, and what the results say."""
