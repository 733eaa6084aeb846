"""`python -m dovetail`, the form that launchers such as torchrun start."""

from __future__ import annotations

from dovetail.cli import main

# Loader workers that are spawned import this module again under another name.
if __name__ == "__main__":
    main()
