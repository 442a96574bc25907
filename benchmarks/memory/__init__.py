"""Tasks that measure memory: each a module with one `Task`, found by its place in this folder."""
