"""Built-in plugins of the export hook, one file each."""
