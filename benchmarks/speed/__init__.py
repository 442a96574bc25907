"""Tasks that measure how long steps take: each a module with one `Task`, found by its place in this folder."""
