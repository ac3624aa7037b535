"""
Compare algorithms on environments: plan → run → statistics → plots → report.

    python -m sb3_adaptive_kl.compare --env CartPole-v1 LunarLander-v3 --algo ppo_kl ppo --seeds 10 --jobs 2 -o results/first

Each stage is a module that reads the previous stage's output from disk. It also runs alone, given the results folder:
``python -m sb3_adaptive_kl.compare.report results/first``.
"""
