"""Training scorers: pairs, rankings or scores of images -> a scorer that `load_reward` opens."""
