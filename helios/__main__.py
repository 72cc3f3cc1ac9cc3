"""``python -m helios``: the command line."""

from helios.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
