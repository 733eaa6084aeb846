"""Built-in plugins of the compile hook, one file each."""
