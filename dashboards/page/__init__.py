"""The live page: a run's journal and traces as values, and a server that shows them."""
