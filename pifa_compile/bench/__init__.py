"""Benchmarks that ``pifa bench`` and the scripts of ``bench/`` run: dense, pair and PIFA in turns, losing rows kept."""
