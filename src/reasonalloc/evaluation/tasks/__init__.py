"""Tasks, one file each: problems with exact answers, and their graders."""
