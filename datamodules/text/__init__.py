"""Text and conversations to token ids, with a mask of what is learnt."""
