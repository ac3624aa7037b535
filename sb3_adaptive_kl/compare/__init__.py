"""
Head-to-head of algorithms on environments: plan → run → statistics → plots → report.

    python -m sb3_adaptive_kl.compare --env CartPole-v1 LunarLander-v3 --algo ppo_kl ppo --seeds 10 --jobs 2 -o results/first

Each stage is a module that reads what the one before it left on disk, and runs alone with the folder as its argument:
``python -m sb3_adaptive_kl.compare.report results/first``.
"""
