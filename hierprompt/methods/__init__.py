"""The methods: one folder a paper, the baselines of the tables in `vit` and `clip`."""
