"""The parts of tools/bench.py: what is compared, how it is measured, and the loops that ours is measured against."""
