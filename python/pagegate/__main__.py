"""`python -m pagegate`: the same as the command `pagegate`."""

from pagegate.cli import main

if __name__ == "__main__":
    main()
