"""The benchmarks of :mod:`benchmarks.trajectory` as one command."""

from benchmarks.trajectory.__main__ import main

if __name__ == "__main__":
    main()
