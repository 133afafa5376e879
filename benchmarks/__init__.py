"""Side-by-side runs against the tools that people use today. `python -m benchmarks --help`."""
