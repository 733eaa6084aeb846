"""Built-in plugins of the log hook, one file each."""
