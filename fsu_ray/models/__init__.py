"""The networks: architectures, the classifier with its weights, the generator, and hooks that watch any network."""
