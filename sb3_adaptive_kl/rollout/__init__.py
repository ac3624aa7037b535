"""Everything learned from SB3's objects: the hosts, their rollout buffers, and the action distributions of their policies."""
