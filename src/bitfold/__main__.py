"""`python -m bitfold` is the `bitfold` program."""

from __future__ import annotations

from bitfold.cli import main

if __name__ == "__main__":
    main()
