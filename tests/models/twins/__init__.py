"""Structural twins of models that no package index ships, in our own words: the names, arguments, token
layouts and the order of steps of the originals, on tiny layers."""
