"""The networks: architectures, weights in and out, the conditional generator, and hooks that watch any network."""
