"""Speed and memory of arms, side by side in one process."""
