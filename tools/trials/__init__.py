"""What `tools/torture.py` puts runs through, one module a trial."""
