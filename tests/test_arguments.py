"""Invalid arguments raise an error that names the argument, its value and a remedy."""

import inspect
import math
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import pytest
import torch as th
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.utils import LinearSchedule

from sb3_adaptive_kl import (
    AdaptiveKLPPO,
    AdaptiveLearningRate,
    AdaptivePenalty,
    FixedPenalty,
    LearningRateRule,
    MaskableAdaptiveKLPPO,
    MaskableRecurrentAdaptiveKLPPO,
    PredictivePenalty,
    RecurrentAdaptiveKLPPO,
    clip_equivalent_target,
)
from sb3_adaptive_kl.arguments import settings_at
from tests.conftest import CASES, logged


@dataclass(frozen=True)
class UsersLearningRateRule(LearningRateRule):
    """It would be called without the balance."""


BAD = [
    ({"target_kl": 0}, r"target_kl=0 must be .*> 0.*try 0.02"),
    ({"target_kl": -0.01}, r"target_kl=-0.01"),
    ({"target_kl": math.nan}, r"target_kl=nan"),
    ({"target_kl": math.inf}, r"target_kl=inf"),
    ({"target_kl": None}, r"target_kl=None"),
    ({"target_kl": "lin_0.02"}, r"target_kl='lin_0.02'.*LinearSchedule\(0.02, 0.0, 1.0\).*only the zoo's yml files"),
    ({"target_kl": "0.03"}, r"target_kl='0.03' must be a finite number > 0.*pass a number without quotes"),
    ({"clip_range": "0.2"}, r"clip_range='0.2' is unknown. Valid are 'outliers', a positive number.*without quotes"),
    ({"clip_range": "clip_0.2"}, r"clip_range='clip_0.2' is unknown.*only the zoo's yml files and -params read this form"),
    ({"clip_range_vf": "0.2"}, r"clip_range_vf='0.2' must be a finite number.*pass a number without quotes"),
    ({"init_kl_coef": "1.0"}, r"init_kl_coef='1.0' must be a finite number within.*pass a number without quotes"),
    ({"ent_coef": "0.01"}, r"ent_coef='0.01' must be a finite number or a schedule.*pass a number without quotes"),
    ({"vf_coef": math.nan}, r"vf_coef=nan must be a finite number or a schedule"),
    ({"ent_coef": "lin_0.01"}, r"ent_coef='lin_0.01' must be .*only the zoo's yml files"),
    ({"kl_rule": "0.5"}, r"kl_rule='0.5' is unknown. Valid are [^(]*or a function \(kl_coef, kl, target_kl\)$"),
    ({"learning_rate_rule": "balance"}, r"did you mean 'balanced'\?.*or a function \(scale, kl, target_kl, balance\)$"),
    ({"kl_rule": "foo"}, r"kl_rule='foo' is unknown. Valid are 'adaptive', 'fixed'"),
    ({"target_kl": True}, r"target_kl=True"),
    ({"target_kl": th.tensor(0.02)}, r"target_kl=tensor\(0.0200\) must be .*pass float\(\) of this Tensor"),
    ({"init_kl_coef": Decimal(2)}, r"init_kl_coef=Decimal\('2'\) must be .*pass float\(\) of this Decimal"),
    ({"target_kl": LinearSchedule}, r"target_kl=<class .*LinearSchedule'> must be .*or a schedule"),
    ({"ent_coef": LinearSchedule}, r"ent_coef=<class .*LinearSchedule'> must be .*or a schedule"),
    ({"kl_ceiling": 0.9}, r"kl_ceiling=0.9.*>= 1.*1.5 is the edge"),
    ({"kl_ceiling": math.nan}, r"kl_ceiling=nan"),
    ({"kl_ceiling": "1.5"}, r"kl_ceiling='1.5'"),
    ({"learning_rate_rule": "adaptative"}, r"learning_rate_rule='adaptative' is unknown, did you mean 'adaptive'\?"),
    ({"kl_rule": {"name": "adaptive", "increase": 1.0}}, r"increase=1.0 must satisfy"),
    ({"learning_rate_rule": {"name": "adaptive", "faktor": 2}}, r"faktor=2 is not a number of 'adaptive', which has factor"),
    ({"kl_coef_bounds": (2.0, 0.5)}, r"kl_coef_bounds=\(2.0, 0.5\).*low <= high"),
    ({"kl_coef_bounds": (0.0, 1.0)}, r"kl_coef_bounds=\(0.0, 1.0\).*never grow"),
    ({"kl_coef_bounds": (-1.0, 1.0)}, r"kl_coef_bounds"),
    ({"kl_coef_bounds": (0.1, math.inf)}, r"kl_coef_bounds"),
    ({"kl_coef_bounds": (0.1, math.nan)}, r"kl_coef_bounds"),
    ({"kl_coef_bounds": 3.0}, r"kl_coef_bounds=3.0"),
    ({"kl_coef_bounds": "ab"}, r"kl_coef_bounds='ab'"),
    ({"init_kl_coef": None}, "init_kl_coef=None must be a finite number within"),
    ({"init_kl_coef": 33.0}, r"init_kl_coef=33.0.*kl_coef_bounds=\(0.03125, 32\)"),
    ({"init_kl_coef": 0.0}, r"init_kl_coef=0.0"),
    ({"init_kl_coef": "1"}, r"init_kl_coef='1'"),
    ({"kl_rule": "adaptative"}, r"kl_rule='adaptative' is unknown, did you mean 'adaptive'\?"),
    ({"kl_rule": "Fix"}, r"did you mean 'fixed'\?"),
    ({"kl_rule": "balanced"}, "kl_rule='balanced' is unknown.* Valid are 'adaptive'"),
    ({"learning_rate_rule": "predictive"}, "learning_rate_rule='predictive' is unknown.* Valid are 'adaptive'"),
    ({"kl_rule": 3}, r"kl_rule=3 is not a kl_rule: pass one of"),
    ({"kl_rule": AdaptiveLearningRate()}, r"kl_rule=AdaptiveLearningRate\(.*\) is not a kl_rule"),
    ({"kl_rule": UsersLearningRateRule()}, "kl_rule=.* is not a kl_rule"),
    ({"kl_rule": PredictivePenalty(segments=0)}, "segments=0: the parts of an update, a whole number of at least 1"),
    ({"kl_rule": {"name": "predictive", "segments": 2.5}}, "segments=2.5: the parts of an update"),
    (
        {"learning_rate_rule": AdaptivePenalty()},
        r"learning_rate_rule=AdaptivePenalty\(.*\) is not a learning_rate_rule",
    ),
    ({"learning_rate_rule": 1.5}, r"learning_rate_rule=1.5 is not a learning_rate_rule: pass one of"),
    ({"learning_rate_rule": AdaptiveLearningRate}, r"is a class: pass an instance, AdaptiveLearningRate\(\)"),
    ({"kl_rule": FixedPenalty}, r"kl_rule=FixedPenalty is a class: pass an instance, FixedPenalty\(\)"),
    ({"kl_divergence": "revers"}, r"kl_divergence='revers' is unknown, did you mean 'reverse'\?"),
    ({"kl_divergence": ["k3"]}, r"kl_divergence=\['k3'\] is unknown"),
    ({"kl_divergence": "KL3"}, r"did you mean 'k3'\?"),
    ({"clip_range": 0.0}, r"clip_range=0.0.*None deactivates"),
    ({"clip_range": -0.2}, r"clip_range=-0.2"),
    ({"clip_range": "lin_0.2"}, r"clip_range='lin_0.2'"),
    ({"clip_range_vf": 0.0}, r"clip_range_vf=0.0"),
    ({"kl_cutoff_coef": -1.0}, r"kl_cutoff_coef=-1.0"),
    ({"compile": "False"}, r"compile='False' must be True or False"),
    ({"kl_stop_factor": 0.0}, r"kl_stop_factor=0.0"),
    ({"batch_size": 1}, r"batch_size=1 .*normalize_advantage=False"),
    ({"batch_size": 0}, r"batch_size=0"),
    ({"batch_size": 32.0}, r"batch_size=32.0"),
    ({"n_epochs": 0}, r"n_epochs=0"),
    ({"n_epochs": True}, r"n_epochs=True must be whole numbers"),
    ({"normalize_advantage": "False"}, r"normalize_advantage='False' must be True or False"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD, ids=[str(kwargs) for kwargs, _ in BAD])
def test_constructor_rejects_invalid_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CASES["discrete"].build(AdaptiveKLPPO, **kwargs)


@pytest.mark.parametrize(("kwargs", "message"), BAD, ids=[str(kwargs) for kwargs, _ in BAD])
def test_load_rejects_invalid_arguments(tmp_path, kwargs, message):
    CASES["discrete"].build(AdaptiveKLPPO).save(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        AdaptiveKLPPO.load(tmp_path / "model", env=CASES["discrete"].make_env(), **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"target_kl": 1},
        {"target_kl": LinearSchedule(0.02, 0.0, 1.0)},
        {"kl_rule": {"name": "adaptive", "high": 1.0}},
        {"kl_coef_bounds": [0.5, 2]},
        {"kl_coef_bounds": (1.0, 1.0)},
        {"normalize_advantage": False, "init_kl_coef": 1e5},
        {"normalize_advantage": False, "batch_size": 1},
        {"kl_rule": lambda kl_coef, kl, target_kl: kl_coef},
        {"clip_range": np.float32(0.2), "clip_range_vf": np.float32(0.2)},
    ],
)
def test_valid_arguments_are_accepted(kwargs):
    CASES["discrete"].build(AdaptiveKLPPO, **kwargs)


@pytest.mark.parametrize(
    ("algorithm", "host"),
    [(AdaptiveKLPPO, PPO), (MaskableAdaptiveKLPPO, MaskablePPO), (RecurrentAdaptiveKLPPO, RecurrentPPO)],
)
def test_signature_extends_the_hosts(algorithm, host):
    """The host's arguments keep their names, positions and defaults, except the two that change their meaning."""
    theirs = inspect.signature(host).parameters
    ours = inspect.signature(algorithm).parameters
    assert list(ours)[: len(theirs) - 1] == list(theirs)[:-1]
    changed = {name for name in theirs if ours[name].default != theirs[name].default}
    assert changed == {"clip_range", "target_kl"}
    required = {name for name, parameter in ours.items() if parameter.default is inspect.Parameter.empty}
    assert required == {"policy", "env"}  # load() passes only these


def test_masked_actions_have_no_state_dependent_exploration():
    with pytest.raises(ValueError, match="continuous actions"):
        MaskableRecurrentAdaptiveKLPPO("MlpLstmPolicy", CASES["discrete"].make_env(), use_sde=True)


@pytest.mark.parametrize("algorithm", [MaskableAdaptiveKLPPO, RecurrentAdaptiveKLPPO, MaskableRecurrentAdaptiveKLPPO])
def test_arguments_of_the_penalty_are_the_same_for_every_host(algorithm):
    first = inspect.signature(AdaptiveKLPPO).parameters
    other = inspect.signature(algorithm).parameters
    added = list(first)[len(inspect.signature(PPO).parameters) - 1 :]
    assert {"init_kl_coef", "kl_rule", "compile"} <= set(added)
    for name in ["clip_range", "target_kl", *added]:
        assert str(other[name]) == str(first[name])  # the annotation, too


def test_every_argument_is_stored_and_documented():
    model = CASES["discrete"].build(AdaptiveKLPPO)
    for name, parameter in inspect.signature(AdaptiveKLPPO).parameters.items():
        if name != "_init_setup_model":
            assert f":param {name}:" in AdaptiveKLPPO.__doc__
        if name.startswith(("kl_", "init_kl", "target_kl", "compile", "clip_range")):
            assert getattr(model, name) == parameter.default


def test_scheduled_target_stays_positive_at_zero():
    model = CASES["discrete"].build(AdaptiveKLPPO, target_kl=LinearSchedule(0.02, 0.0, 1.0))
    assert settings_at(model, 1.0).target_kl == pytest.approx(0.02)
    assert 0 < settings_at(model, 0.0).target_kl < 1e-9
    model.learn(2 * model.n_steps)
    assert "kl" in logged(model)
    assert "kl_over_target" not in logged(model)  # it would be the KL in multiples of a stand-in for 0


@pytest.mark.parametrize("name", ["target_kl", "clip_range", "clip_range_vf"])
@pytest.mark.parametrize("value", [-0.01, math.nan, None, "0.01"])
def test_error_names_schedule_with_invalid_value(name, value):
    model = CASES["discrete"].build(AdaptiveKLPPO)
    setattr(model, name, lambda progress: value)
    with pytest.raises(ValueError, match=rf"^{name}: {value!r} at progress_remaining=0.5 is not a finite number"):
        settings_at(model, 0.5)


def test_loaded_beta_must_be_within_new_bounds(tmp_path):
    CASES["discrete"].build(AdaptiveKLPPO).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"^kl_coef=1.0 must be .* within kl_coef_bounds=\(2, 4\): .*in load\(\) by kl_coef="):
        AdaptiveKLPPO.load(tmp_path / "model", kl_coef_bounds=(2, 4), init_kl_coef=3.0)
    assert AdaptiveKLPPO.load(tmp_path / "model", kl_coef_bounds=(2, 4), init_kl_coef=3.0, kl_coef=2.0).kl_coef == 2.0


def test_batch_size_none_is_rejected():
    with pytest.raises(ValueError, match=r"batch_size=None.*n_steps \* n_envs"):
        CASES["discrete"].build(AdaptiveKLPPO, batch_size=None)


@pytest.mark.parametrize("result", [math.nan, None, "1.0"])
def test_error_names_rule_with_invalid_result(result):
    model = CASES["discrete"].build(AdaptiveKLPPO, n_steps=64, kl_rule=lambda kl_coef, kl, target_kl: result)
    with pytest.raises(ValueError, match=rf"kl_rule=.*returned {result!r} for kl_coef=1.0"):
        model.learn(64)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("target_kl", 0.0, "target_kl=0.0 must be"),
        ("target_kl", -1.0, "target_kl=-1.0 must be"),
        ("kl_ceiling", math.nan, "kl_ceiling=nan must be"),
        ("clip_range", "outlier", "clip_range='outlier' is unknown, did you mean 'outliers'"),
        ("kl_divergence", "k4", "kl_divergence='k4' is unknown, did you mean 'k3'"),
        ("n_epochs", 0, "n_epochs=0 must be whole numbers"),
        ("kl_coef", -5.0, "kl_coef=-5.0 must be a finite number within kl_coef_bounds"),
        ("kl_coef", 0.0, "kl_coef=0.0 must be a finite number within kl_coef_bounds"),
        ("kl_coef", 33.0, r"kl_coef=33.0 must be a finite number within kl_coef_bounds=\(0.03125, 32\)"),
        ("kl_coef", "2", "kl_coef='2' must be a finite number within kl_coef_bounds"),
    ],
)
def test_callback_that_sets_an_invalid_value_is_told(name, value, message):
    model = CASES["box"].build(AdaptiveKLPPO, n_steps=64, batch_size=32)
    with pytest.raises(ValueError, match=message):
        model.learn(64, callback=lambda *_: setattr(model, name, value) or True)


def test_callback_may_move_beta_and_its_bounds():
    """What β began with does not matter any more."""
    model = CASES["box"].build(AdaptiveKLPPO, n_steps=64, batch_size=32)
    model.learn(64, callback=lambda *_: vars(model).update(kl_coef=3.0, kl_coef_bounds=(2, 8)) or True)
    assert 2 <= model.kl_coef <= 8


def test_model_of_ppo_that_is_loaded_needs_a_target(tmp_path):
    CASES["box"].build(PPO, n_steps=64).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"target_kl=None.*a model of PPO has none, pass load\(\) a target_kl"):
        AdaptiveKLPPO.load(tmp_path / "model", clip_range=None)
    loaded = AdaptiveKLPPO.load(tmp_path / "model", env=CASES["box"].make_env(), target_kl=0.01)
    assert loaded.clip_range(1.0) == pytest.approx(0.2)  # it clips as PPO did
    loaded.learn(64)
    assert AdaptiveKLPPO.load(tmp_path / "model", target_kl=0.01, clip_range=None).clip_range is None


def test_a_target_that_restrains_nothing_is_told():
    with pytest.warns(UserWarning, match=r"target_kl=200 nats restrains nothing"):
        CASES["box"].build(AdaptiveKLPPO, target_kl=clip_equivalent_target(20))


class NeedsAnEnvironment(AdaptiveKLPPO):
    def __init__(self, policy, env, **kwargs):
        super().__init__(policy, env, **kwargs)
        self.observation_shape = self.env.observation_space.shape


def test_subclass_that_needs_an_environment_can_be_loaded(tmp_path):
    env = CASES["box"].make_env()
    NeedsAnEnvironment("MlpPolicy", env, device="cpu").save(tmp_path / "model")
    loaded = NeedsAnEnvironment.load(tmp_path / "model", env=env, target_kl=0.05, num_timesteps=3)
    assert (loaded.target_kl, loaded.num_timesteps) == (0.05, 3)


def test_a_misspelled_argument_of_load_is_told(tmp_path):
    CASES["box"].build(AdaptiveKLPPO).save(tmp_path / "model")
    with pytest.warns(UserWarning, match=r"kl_target=...\) is not an argument of AdaptiveKLPPO, did you mean 'target_kl'\?"):
        AdaptiveKLPPO.load(tmp_path / "model", kl_target=0.05)
    known = {"target_kl": 0.05, "num_timesteps": 3, "kl_coef": 2.0, "step_scale": 0.5, "device": "cpu"}
    loaded = AdaptiveKLPPO.load(tmp_path / "model", **known)
    assert (loaded.target_kl, loaded.num_timesteps, loaded.kl_coef) == (0.05, 3, 2.0)
