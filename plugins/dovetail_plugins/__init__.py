"""The built-in plugins of dovetail, one folder per hook, one file per plugin."""
