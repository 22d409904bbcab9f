"""One token after another: with a cache where the policy has one, recomputing the whole text where not."""
