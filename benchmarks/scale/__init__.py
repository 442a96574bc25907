"""Tasks that measure growth with the size of a model: each a module with one `Task`, found by its place here."""
