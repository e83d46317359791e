"""Training of converted models: what is learned (stages.py) and the loop that learns it (engine.py)."""
