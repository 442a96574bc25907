"""What is shown to people: tables, pictures, findings, advice, progress."""
