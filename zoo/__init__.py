"""The embedded benchmark: a small CLIP, the tasks that it is asked to solve, and one expert a task."""
