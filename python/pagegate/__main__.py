"""`python -m pagegate` is the command line."""

from pagegate.cli import main

if __name__ == "__main__":
    main()
