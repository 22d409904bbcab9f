"""Where rows come from and what they say: sources and splits, and each format as one canonical `Example`."""
