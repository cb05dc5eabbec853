"""What reproducing the paper and the benchmarks share: a runner, a cache of results, trainings, tables and figures."""
