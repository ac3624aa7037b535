"""What is read from the rollout buffers, policies and action distributions of SB3 and sb3-contrib."""
