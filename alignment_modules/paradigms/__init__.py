"""What is trained for: one paradigm a file, none of which imports another."""
