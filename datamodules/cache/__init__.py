"""Tables on disk: made once, by several processes, and mapped into memory by all that read them."""
