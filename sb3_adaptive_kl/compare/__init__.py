"""
Compare algorithms on environments: plan → run → statistics → plots → report.

    python -m sb3_adaptive_kl.compare --env CartPole-v1 LunarLander-v3 --algo ppo_kl ppo --seeds 10 --jobs 2 -o results/first

All stages share one results folder. ``python -m sb3_adaptive_kl.compare.report FOLDER`` repeats those after the runs, for
example while others are still running.
"""
