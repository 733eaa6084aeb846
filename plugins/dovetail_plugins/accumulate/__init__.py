"""Built-in plugins of the accumulate hook, one file each."""
