"""One module per family of models, each with a FAMILY (cluster/models/family.py)."""
