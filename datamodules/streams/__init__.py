"""Training rows that are read, tokenised and packed while a run trains, each shard of a stream by one process."""
