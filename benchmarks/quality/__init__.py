"""Tasks that measure how well models do: each a module with one `Task`, found by its place in this folder."""
