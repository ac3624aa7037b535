"""
Continue a policy you trust: clone an expert, then train on from the clone with PPO, with a KL that is held at a target, or
with the clone as the reference policy, too.

    python examples/continue_a_policy.py --env LunarLander-v3 --arm reference --seed 0 -n 200000 -o runs/reference.csv

The expert is one of the trained agents of this repository, or ``--expert``, a model without an LSTM that was saved by PPO or
this package (with the zoo's ``<env>/vecnormalize.pkl`` beside it, if it has one). The CSV file has one line for each
evaluation, the first that of the clone, and beside each what the clone and random actions reach; it is written at the end, and
a run whose file is there is not repeated. ``--env-kwargs '{"gravity": -5.0}'`` trains and evaluates on a changed task.
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_adaptive_kl import HELD, AdaptiveKLPPO

AGENTS = Path(__file__).parents[1] / "trained_agents" / "ppo_kl"
N_ENVS, N_EVAL_ENVS = 8, 4


def make_env(args: argparse.Namespace, n_envs: int, seed: int, env_kwargs: dict[str, Any]) -> VecEnv:
    """Make environments whose observations are those that the expert was trained on."""
    env = make_vec_env(args.env, n_envs, seed, env_kwargs=env_kwargs)
    statistics = args.expert.with_suffix("") / "vecnormalize.pkl"
    if statistics.exists():
        env = VecNormalize.load(str(statistics), env)
        env.training = env.norm_reward = False  # the reference policy needs observations that mean the same throughout
    return env


def demonstrate(expert: Any, env: VecEnv, n: int) -> tuple[th.Tensor, th.Tensor]:
    """Let the expert act for n transitions."""
    observations, actions, observation = [], [], env.reset()
    for _ in range(n // env.num_envs):
        if expert.use_sde:  # predict() would use one draw of the noise throughout
            expert.policy.reset_noise(env.num_envs)
        action, _ = expert.predict(observation)  # with its noise: a clone of the best actions alone would have no spread
        observations.append(observation)
        actions.append(action)
        observation, _, _, _ = env.step(action)
    return th.as_tensor(np.concatenate(observations)), th.as_tensor(np.concatenate(actions))


def clone_behavior(policy: ActorCriticPolicy, observations: th.Tensor, actions: th.Tensor, n_epochs: int = 30) -> None:
    """Maximize the likelihood of the expert's actions. The critic learns nothing from them."""
    optimizer = th.optim.Adam(policy.parameters(), lr=1e-3)
    policy.set_training_mode(True)
    for _ in range(n_epochs):
        for index in th.randperm(len(observations)).split(64):
            _, log_prob, entropy = policy.evaluate_actions(observations[index], actions[index])
            loss = -(log_prob + 1e-3 * entropy).mean()  # a little entropy, as in imitation
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def clone_expert(args: argparse.Namespace, path: Path) -> float:
    """Save a clone of the expert as a model of PPO, and return the expert's discount factor."""
    # PPO reads the agents of AdaptiveKLPPO, too
    objects = {"clip_range": 0.2, "target_kl": None, "lr_schedule": lambda _: 0.0, "learning_rate": 0.0}
    expert = PPO.load(args.expert, device="cpu", custom_objects=objects)
    if hasattr(expert.policy, "lstm_actor"):
        raise ValueError(f"{args.expert} has an LSTM, which would forget everything at each step of the demonstrations")
    env = make_env(args, N_ENVS, args.seed, {})
    clone = PPO("MlpPolicy", env, n_steps=2048 // N_ENVS, gamma=expert.gamma, seed=args.seed, device="cpu")
    clone_behavior(clone.policy, *demonstrate(expert, env, args.n_transitions))
    clone.save(path)
    return expert.gamma


def continue_as(args: argparse.Namespace, path: Path, env: VecEnv) -> PPO:
    """Load a model of PPO. It goes on as one of AdaptiveKLPPO: load() replaces its clip range and sets the rest."""
    if args.arm == "ppo":
        return PPO.load(path, env, device="cpu")
    kwargs = {"reference_policy": {"policy": str(path), **args.reference}} if args.arm == "reference" else {}
    return AdaptiveKLPPO.load(path, env, device="cpu", compile=args.compile, **HELD, **kwargs)


def random_policy(space: gym.Space, seed: int) -> Any:
    """Act as a policy that knows nothing, for ``evaluate_policy``."""
    space.seed(seed)
    return SimpleNamespace(predict=lambda observations, **_: (np.array([space.sample() for _ in observations]), None))


def json_object(text: str) -> Any:
    return json.loads(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="LunarLander-v3", help="environment")
    parser.add_argument("--arm", choices=("ppo", "held", "reference"), default="reference", help="how to train on")
    parser.add_argument("--seed", type=int, default=0, help="of the demonstrations, the clone and the training")
    parser.add_argument("-n", "--n-timesteps", type=int, default=200_000, help="time steps after the clone")
    parser.add_argument("-o", "--output", type=Path, default=Path("evaluations.csv"), help="file of the evaluations")
    parser.add_argument("--expert", type=Path, help="saved model (default: the trained agent of the environment)")
    parser.add_argument("--n-transitions", type=int, default=10_000, help="demonstrations")
    parser.add_argument("--env-kwargs", type=json_object, default={}, help="of a changed task, in JSON")
    parser.add_argument("--reference", type=json_object, default={}, help='JSON, such as {"target_kl": 0.5}')
    parser.add_argument("--compile", action="store_true", help="compile the training, unless the arm is ppo")
    parser.add_argument("--eval-every", type=int, default=10_000, help="time steps between evaluations")
    parser.add_argument("--eval-episodes", type=int, default=20, help="episodes of an evaluation")
    args = parser.parse_args()
    args.expert = args.expert or AGENTS / f"{args.env}_1" / f"{args.env}.zip"
    if not args.expert.exists():
        parser.error(f"{args.expert} does not exist: pass a saved model with --expert")
    if not N_ENVS <= args.eval_every <= args.n_timesteps:
        parser.error(f"--eval-every {args.eval_every} must be between {N_ENVS} environments and {args.n_timesteps} time steps")
    return args


def main() -> None:
    """Clone, continue, and write the evaluations."""
    args = parse_arguments()
    if args.output.exists():  # it is written at the end: so a study goes on where it was interrupted
        print(f"{args.output} is complete: remove it to repeat the run")
        return
    th.set_num_threads(1)
    set_random_seed(args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)

    path = args.output.with_suffix(".clone.zip")
    gamma = clone_expert(args, path)
    env = make_env(args, N_ENVS, 1000 + args.seed, args.env_kwargs)
    env = VecNormalize(env, norm_obs=False, gamma=gamma)  # rewards of one scale for the critic, whatever the task
    evaluation_env = make_env(args, N_EVAL_ENVS, 2000 + args.seed, args.env_kwargs)
    evaluation_env = VecNormalize(evaluation_env, training=False, norm_obs=False, norm_reward=False)
    model = continue_as(args, path, env)

    known = {"env": args.env, "arm": args.arm, "seed": args.seed}
    if args.env_kwargs:
        known["env"] += f" {json.dumps(args.env_kwargs)}"
    for name, policy in (("cloned", model), ("random", random_policy(evaluation_env.action_space, args.seed))):
        known[f"{name}_return"], _ = evaluate_policy(policy, evaluation_env, 2 * args.eval_episodes)

    evaluation = EvalCallback(
        evaluation_env,
        n_eval_episodes=args.eval_episodes,
        eval_freq=args.eval_every // N_ENVS,
        log_path=str(args.output.with_suffix("")),
        verbose=0,
    )
    model.learn(args.n_timesteps, callback=evaluation)
    evaluations = {
        "timesteps": [0, *evaluation.evaluations_timesteps],
        "return": [known["cloned_return"], *np.mean(evaluation.evaluations_results, axis=1)],
    }
    unfinished = args.output.with_suffix(".unfinished")
    pd.DataFrame(evaluations).assign(**known).to_csv(unfinished, index=False)
    unfinished.replace(args.output)
    print(f"Saved {len(evaluations['return'])} evaluations to {args.output}, the first that of the clone")


if __name__ == "__main__":
    main()
