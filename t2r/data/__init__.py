"""Text for training: files and hub data sets (sources.py) tokenised once (tokens.py), packed into rows (packing.py)."""
