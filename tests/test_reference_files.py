"""Where a reference policy comes from: objects and files, saving and loading, and what is said about wrong ones."""

import math
import pickle
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import TRPO, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule

from sb3_adaptive_kl import AdaptiveKLPPO, ReferencePolicy
from sb3_adaptive_kl.distributed import RanksDisagree
from sb3_adaptive_kl.reference import from_frozen_bytes, frozen_bytes
from sb3_adaptive_kl.rollout.reference import read_policy
from sb3_adaptive_kl.zoo import parse_trust_region
from tests import test_maskable, test_recurrent
from tests.conftest import CASES, FAMILIES, collect, logged, parameters, pendulum
from tests.test_distributed import N_ENVS, learned, rollout_of, trained

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}


def weights(policy):
    return th.nn.utils.parameters_to_vector(policy.parameters()).detach()


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("algorithm", "case"),
    [
        *((PPO, CASES[name]) for name in ("gsde-squashed", "multibinary", "dict", "separate-extractors")),
        (A2C, CASES["box"]),
        (TRPO, CASES["discrete"]),
        (AdaptiveKLPPO, CASES["gsde"]),
        (MaskablePPO, test_maskable.CASES["multibinary"]),
        (RecurrentPPO, test_recurrent.CASES["gsde"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_policy_of_a_saved_model_is_read(algorithm, case, tmp_path):
    kwargs = {} if algorithm is A2C else {"batch_size": 32}
    model = case.build(algorithm, n_steps=64, learning_rate=LinearSchedule(1e-3, 0, 1.0), **kwargs)
    model.save(tmp_path / "saved")
    before = th.get_rng_state()
    policy = read_policy(str(tmp_path / "saved"))
    assert th.equal(th.get_rng_state(), before)
    assert type(policy) is type(model.policy)
    assert th.equal(weights(policy), weights(model.policy))


@pytest.mark.parametrize("case", [*FAMILIES, "cnn", "dict", "separate-extractors"])
def test_policy_that_was_saved_alone_is_read(case, tmp_path):
    """As imitation does; SB3's file does not name the class, nor tell whether the critic has features of its own."""
    policy = CASES[case].build(PPO, n_steps=64, batch_size=64).policy
    if not policy.share_features_extractor:
        with th.no_grad():
            for parameter in policy.vf_features_extractor.parameters():
                parameter += 0.3
    policy.save(tmp_path / "policy.pt")
    th.save(policy, tmp_path / "object.pt")
    observation = policy.obs_to_tensor(CASES[case].make_env().reset()[0])[0]
    for name in ("policy.pt", "object.pt"):
        found = read_policy(str(tmp_path / name))
        log_probs = [
            each.get_distribution(observation).log_prob(policy.get_distribution(observation).mode())
            for each in (found, policy)
        ]
        assert th.equal(*log_probs)
    CASES[case].build(AdaptiveKLPPO, reference_policy=tmp_path / "policy.pt", **SMALL)


def test_copy_of_a_trained_policy_has_neither_optimizer_nor_graph():
    model = CASES["gsde"].build(PPO, n_steps=64, batch_size=32).learn(64)  # copy.deepcopy(model.policy) fails
    copy = from_frozen_bytes(frozen_bytes(model.policy))
    assert th.equal(weights(copy), weights(model.policy))
    assert copy.optimizer is None
    assert model.policy.optimizer is not None
    again = pickle.loads(pickle.dumps(ReferencePolicy(copy, kl_coef=0.1, target_kl=0.2, direction="forward")))
    assert th.equal(weights(again.policy), weights(copy))
    assert (again.kl_coef, again.target_kl, again.direction) == (0.1, 0.2, "forward")


# ---------------------------------------------------------------- save and load


def test_policy_is_saved_with_the_model(tmp_path):
    """So that it can be loaded anywhere; the coefficient goes on from where it was."""
    reference = ReferencePolicy(CASES["box"].build(PPO, n_steps=64, batch_size=64, seed=1).policy, target_kl=1e-6)
    model = CASES["box"].build(AdaptiveKLPPO, reference_policy=reference, **SMALL).learn(2 * 64)
    model.save(tmp_path / "model")
    loaded = AdaptiveKLPPO.load(tmp_path / "model", env=pendulum(), device="cpu")
    assert loaded.reference_kl_coef == model.reference_kl_coef == 4.0
    collect(model)
    loaded.rollout_buffer = model.rollout_buffer
    loaded.set_logger(model.logger)
    for each in (model, loaded):
        np.random.seed(7)
        each.train()
    assert th.equal(weights(loaded._reference.policy), weights(model._reference.policy))
    assert th.equal(parameters(loaded), parameters(model))
    assert loaded.reference_kl_coef == model.reference_kl_coef == 8.0
    # PPO does not know it, and is not disturbed
    assert (
        PPO.load(tmp_path / "model", device="cpu", custom_objects={"clip_range": 0.2, "target_kl": None}).num_timesteps == 128
    )
    other = CASES["box"].build(AdaptiveKLPPO, reference_policy=reference, **SMALL)
    other.set_parameters(loaded.get_parameters())
    assert other.reference_kl_coef == 8.0
    plain = CASES["box"].build(AdaptiveKLPPO, **SMALL)
    other.set_parameters(plain.get_parameters())
    assert other.reference_kl_coef == 8.0
    for policy, logged_coef in ((None, None), ({"policy": loaded._reference.policy, "kl_coef": 0.7}, 0.7)):
        changed = AdaptiveKLPPO.load(tmp_path / "model", env=pendulum(), reference_policy=policy).learn(64)
        assert logged(changed).get("reference_kl_coef") == logged_coef


def test_policy_given_to_load_is_copied_then(tmp_path):
    """And not when training goes on: the user may have trained the original further by then."""
    other = CASES["box"].build(PPO, n_steps=64, batch_size=64, seed=1)
    CASES["box"].build(AdaptiveKLPPO, **SMALL).save(tmp_path / "model")
    before = weights(other.policy).clone()
    loaded = AdaptiveKLPPO.load(tmp_path / "model", env=pendulum(), device="cpu", reference_policy=other.policy)
    with th.no_grad():
        next(other.policy.parameters()).add_(1.0)
    loaded.learn(64)
    assert th.equal(weights(loaded._reference.policy), before)


@pytest.mark.parametrize("argument", [str, Path, lambda path: {"policy": str(path), "kl_coef": 0.5}, ReferencePolicy])
def test_path_is_read_again_where_the_model_is_trained(argument, tmp_path):
    path = tmp_path / "reference.zip"
    CASES["box"].build(PPO, n_steps=64, batch_size=64, seed=1).save(path)
    model = CASES["box"].build(AdaptiveKLPPO, reference_policy=argument(path), **SMALL).learn(64)
    model.save(tmp_path / "model")
    path.rename(tmp_path / "elsewhere.zip")
    loaded = AdaptiveKLPPO.load(tmp_path / "model", env=pendulum(), device="cpu")
    assert loaded.predict(np.zeros(3, dtype=np.float32))  # acts without a reference
    with pytest.raises(ValueError, match=r"reference\.zip': there is no such file .*load\(…, reference_policy=…\) names"):
        loaded.learn(64)
    moved = AdaptiveKLPPO.load(tmp_path / "model", env=pendulum(), device="cpu", reference_policy=str(tmp_path / "elsewhere"))
    assert moved.learn(64, reset_num_timesteps=False).num_timesteps == 128
    assert logged(moved)["reference_kl"] > 0


def test_another_reference_may_be_set_later():
    first, second = (CASES["box"].build(PPO, n_steps=64, batch_size=64, seed=seed).policy for seed in (1, 2))
    model = CASES["box"].build(AdaptiveKLPPO, **SMALL)
    for policy in (first, second):
        model.reference_policy = policy
        model.learn(64, reset_num_timesteps=False)
        assert th.equal(weights(model._reference.policy), weights(policy))
    model.reference_policy = None
    model.learn(64, reset_num_timesteps=False)
    assert "reference_kl" not in logged(model)


# ---------------------------------------------------------------- wrong input


class Wider(gym.ObservationWrapper):
    def __init__(self):
        super().__init__(pendulum())
        self.observation_space = spaces.Box(-10, 10, (4,))


def policy_of(case, algorithm=PPO, **kwargs):
    return CASES[case].build(algorithm, **{"n_steps": 64, "batch_size": 64, **kwargs}).policy


def without_spread(log_std=-200.0):
    policy = policy_of("box")
    with th.no_grad():
        policy.log_std.fill_(log_std)
    return policy


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (lambda: "clone.zip", r"reference_policy='clone\.zip': there is no such file in .*Pass the path of a saved model"),
        (lambda: __file__, "cannot be read .* must be a model saved by model.save"),
        (lambda: CASES["box"].build(PPO), "PPO: that is a model, pass its policy, reference_policy=model.policy"),
        (lambda: ActorCriticPolicy, r"ActorCriticPolicy: pass a policy with get_distribution\(\), such as model\.policy"),
        (lambda: th.nn.Linear(3, 1), r"Linear: pass a policy with get_distribution\(\)"),
        (lambda: 0.5, r"float: pass a policy with get_distribution\(\), .* or a saved model's path"),
        (lambda: policy_of("discrete"), r"the action_space Discrete\(4\), and the environment has Box"),
        (lambda: PPO("MlpPolicy", Wider()).policy, "the observation_space .* pass a policy of this environment"),
        (lambda: policy_of("gsde-squashed"), "squash_output=True, and the policy in training False"),
        (lambda: {"target_kl": 0.5}, "has no 'policy': add the path"),
        (lambda: {"policy": "x", "kl_coeff": 1}, "'kl_coeff' is unknown, did you mean 'kl_coef'"),
        (lambda: ReferencePolicy("x", kl_coef=-1), "kl_coef=-1 must be a finite number >= 0"),
        (lambda: ReferencePolicy("x", kl_coef="lin_1"), "kl_coef='lin_1' must be"),
        (lambda: ReferencePolicy("x", kl_coef=LinearSchedule), "kl_coef=<class .*LinearSchedule'> must be .* a schedule"),
        (lambda: ReferencePolicy("x", target_kl=0), "target_kl=0 must be a finite number > 0"),
        (lambda: ReferencePolicy("x", kl_coef=lambda p: p, target_kl=0.5), "a schedule of kl_coef does, too: pass one"),
        (lambda: ReferencePolicy("x", direction="revers"), "'revers' is unknown, did you mean 'reverse'"),
        (lambda: ReferencePolicy(policy_of("box"), 100.0, 0.5), r"kl_coef=100.0 must be .*kl_coef_bounds=\(0.03125, 32\)"),
        (lambda: ReferencePolicy(policy_of("box"), lambda p: -1.0), "kl_coef: -1.0 at progress_remaining"),
    ],
)
def test_wrong_input_is_rejected_with_a_remedy(argument, message):
    with pytest.raises(ValueError, match=message):
        CASES["box"].build(AdaptiveKLPPO, reference_policy=argument(), **SMALL)


def test_other_saved_models_are_rejected(tmp_path):
    DQN("MlpPolicy", "CartPole-v1", buffer_size=10).save(tmp_path / "dqn")
    with pytest.raises(ValueError, match=r"holds a DQNPolicy, which does not tell .* pass a model of PPO"):
        read_policy(str(tmp_path / "dqn"))
    recurrent = test_recurrent.CASES["box"].build(RecurrentPPO, n_steps=64, batch_size=64)
    recurrent.policy.save(tmp_path / "lstm.pt")  # the file does not tell that there is an LSTM
    with pytest.raises(ValueError, match="Of others, pass the policy itself"):
        read_policy(str(tmp_path / "lstm.pt"))


@pytest.mark.parametrize("log_std", [-200.0, -50.0])  # 0 in single precision; the KL to it is infinite
def test_distribution_without_spread_is_rejected(log_std):
    model = CASES["box"].build(AdaptiveKLPPO, reference_policy=without_spread(log_std), **SMALL)
    with pytest.raises(ValueError, match=r"not finite, or without enough spread .* clone it with an entropy bonus.*'forward'"):
        model.learn(64)
    measured = ReferencePolicy(without_spread(log_std), kl_coef=0)
    model = CASES["box"].build(AdaptiveKLPPO, reference_policy=measured, **SMALL)
    if log_std == -50:
        assert logged(model.learn(64))["reference_kl"] == math.inf
        forward = ReferencePolicy(without_spread(log_std), direction="forward")
        model = CASES["box"].build(AdaptiveKLPPO, reference_policy=forward, **SMALL).learn(64)
        assert logged(model)["reference_kl"] == pytest.approx(50, rel=0.1)


def test_zoo_reads_a_coefficient_that_fades():
    parsed = parse_trust_region({"reference_policy": {"policy": "clone.zip", "kl_coef": "lin_2.0"}})
    assert parsed["reference_policy"]["policy"] == "clone.zip"
    assert parsed["reference_policy"]["kl_coef"](0.25) == 0.5
    with pytest.raises(ValueError, match=r"kl_coef='often' must be a number or lin_1\.0"):
        parse_trust_region({"reference_policy": {"policy": "clone.zip", "kl_coef": "often"}})
    assert parse_trust_region({"reference_policy": "clone.zip"}) == {"reference_policy": "clone.zip"}


# ---------------------------------------------------------------- ranks


def test_two_ranks_equal_one_process_with_a_reference(ranks):
    rollout = rollout_of("AdaptiveKLPPO")
    reference = ReferencePolicy(CASES["box"].build(PPO, seed=1).policy, target_kl=1e-3)
    arguments = {"reference_policy": reference, "kl_rule": "predictive", "kl_ceiling": 1.5}
    expected, _, log = trained("AdaptiveKLPPO", rollout, N_ENVS, arguments)
    assert log["reference_kl"] > 0
    for theirs, _, their_log in ranks.run(trained, "AdaptiveKLPPO", rollout, N_ENVS // 2, arguments):
        assert all(th.allclose(theirs[name], expected[name], rtol=0, atol=1e-6) for name in expected)
        assert their_log == pytest.approx(log, rel=1e-3, abs=1e-6)


def learned_with_reference_of(seeds):
    """Each rank with a reference of its own."""
    import torch.distributed as dist

    case = CASES["discrete"]._replace(make_env=lambda: gym.make("CartPole-v1"))
    return learned(reference_policy=case.build(PPO, seed=seeds[dist.get_rank()]).policy)


def test_ranks_must_have_the_same_reference(ranks):
    for error in ranks.run(learned_with_reference_of, (0, 1)):
        assert isinstance(error, RanksDisagree)
        assert "reference_policy is" in str(error)
