"""A part of the zoo (see zoo.py)."""

TINY = []
