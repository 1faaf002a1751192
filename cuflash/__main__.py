"""``python -m cuflash``."""

from __future__ import annotations

from cuflash.cli import main

if __name__ == "__main__":
    main()
