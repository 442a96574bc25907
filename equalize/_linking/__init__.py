"""From models and names to groups: everything is validated, then applied."""
