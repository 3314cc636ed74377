"""`edgetool eval`: how good a model still is, measured beside its original on the same questions."""
