"""``python -m exactprune`` is the command ``exactprune``."""

from exactprune.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
