"""One file a power source, found by its file's name; one that cannot answer says why."""
