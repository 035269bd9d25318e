"""The built-in datasets: scenes and moving scenes, painted from a seed."""
