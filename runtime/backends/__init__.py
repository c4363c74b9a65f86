"""One file a backend, found by its name: it loads an engine and runs it."""
