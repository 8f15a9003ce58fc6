"""Tasks: problems with exact answers, and their graders."""
