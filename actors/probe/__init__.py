"""`python -m actors.probe`: what this machine computes, for planning. It measures the code that actors compute with."""
