"""Has the pages of `bare_loop(pager=...)`: `python benches/handler.py FILE`, with two more arguments."""

import sys

from pagegate._core import serve_missing

if __name__ == "__main__":
    file, base, size = sys.argv[1:]
    serve_missing(file, int(base), int(size))
