"""One policy, trained by all processes of a ``torch.distributed`` group: Heess et al. 2017 (https://arxiv.org/abs/1707.02286)."""
