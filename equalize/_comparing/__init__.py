"""What `equalize.compare` does: data that are split, ways to tie, one run after the other, and a file of those done."""
