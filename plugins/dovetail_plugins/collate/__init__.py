"""Built-in plugins of the collate hook, one file each."""
