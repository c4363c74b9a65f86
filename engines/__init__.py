"""Canonical graph to engine: lowering passes and one builder a backend, found by its file's name."""
