"""What is trained on what: one file a paradigm, none of which imports another."""
