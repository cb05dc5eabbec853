"""Shared by the paper's reproduction and the benchmarks: a runner, a result cache, trainings, tables and figures."""
