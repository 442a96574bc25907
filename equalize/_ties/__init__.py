"""Who is tied, how, and what one optimizer step does about it."""
