"""Texts before they are tokens: read from files, and cut where a reader would cut them. Nothing here knows a model."""
