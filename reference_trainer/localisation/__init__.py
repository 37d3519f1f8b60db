"""Judges networks by where they say the sources stand, beside classical estimators and the bound."""
