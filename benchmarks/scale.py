"""``python -m benchmarks.scale``: see :mod:`benchmarks.trajectory.scale`."""

from benchmarks.trajectory.scale import main

if __name__ == "__main__":
    main()
