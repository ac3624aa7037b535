"""β is part of a saved model: saving, loading and continuing gives the same result as an uninterrupted run."""

import json
import zipfile

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.utils import LinearSchedule

from sb3_adaptive_kl import AdaptiveKLPPO
from tests.conftest import CASES, FAMILIES, collect, parameters

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}


def numbers(model):
    names = vars(model).keys() - {"start_time"}
    return {name: vars(model)[name] for name in names if isinstance(vars(model)[name], int | float)}


@pytest.mark.parametrize("case", [*FAMILIES, "cnn", "dict"])
def test_continued_run_is_bit_identical(case, tmp_path):
    unbroken = CASES[case].build(AdaptiveKLPPO, target_kl=LinearSchedule(0.02, 0.0, 1.0), **SMALL).learn(3 * 64)
    unbroken.save(tmp_path / "model")
    loaded = AdaptiveKLPPO.load(tmp_path / "model", env=CASES[case].make_env(), device="cpu")
    assert numbers(loaded) == numbers(unbroken)
    assert loaded.kl_coef != loaded.init_kl_coef

    # The environment is not saved, so give both models the same rollout and the same random numbers
    collect(unbroken)
    loaded.rollout_buffer = unbroken.rollout_buffer
    loaded.set_logger(unbroken.logger)
    before = loaded.kl_coef
    for model in (unbroken, loaded):
        model._current_progress_remaining = 0.5  # at 0, where the run has ended, so has the target, and β rests
        np.random.seed(7)
        th.manual_seed(7)
        model.train()

    assert th.equal(parameters(loaded), parameters(unbroken))
    assert loaded.kl_coef == unbroken.kl_coef != before


def test_two_calls_of_learn_equal_one():
    """``reset_num_timesteps=False`` keeps β and the counters. The runs are comparable because the schedules are constant."""
    once = CASES["box"].build(AdaptiveKLPPO, **SMALL).learn(4 * 64)
    twice = CASES["box"].build(AdaptiveKLPPO, **SMALL).learn(2 * 64)
    assert twice.kl_coef != twice.init_kl_coef
    twice.learn(2 * 64, reset_num_timesteps=False)
    assert th.equal(parameters(twice), parameters(once))
    assert (twice.kl_coef, twice.num_timesteps, twice._n_updates) == (once.kl_coef, 4 * 64, once._n_updates)


@pytest.mark.parametrize("kl_rule", ["adaptive", "fixed", "proportional"])
def test_arguments_are_saved_and_can_be_replaced(kl_rule, tmp_path):
    model = CASES["discrete"].build(AdaptiveKLPPO, kl_rule=kl_rule, kl_coef_bounds=(0.5, 4.0), clip_range=0.3, **SMALL)
    model.save(tmp_path / "model")
    loaded = AdaptiveKLPPO.load(tmp_path / "model", target_kl=0.05, init_kl_coef=2.0)
    assert (loaded.kl_rule, tuple(loaded.kl_coef_bounds), loaded.target_kl) == (kl_rule, (0.5, 4.0), 0.05)
    assert loaded.clip_range(1.0) == 0.3
    assert loaded.kl_coef == 1.0  # The saved value, not the new init_kl_coef
    assert AdaptiveKLPPO.load(tmp_path / "model", kl_coef=3.0).kl_coef == 3.0


def test_numbers_are_readable_in_the_zip_file(tmp_path):
    CASES["discrete"].build(AdaptiveKLPPO, target_kl=0.02).save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        data = json.loads(archive.read("data"))
    assert (data["kl_coef"], data["target_kl"], data["kl_rule"], data["clip_range"]) == (1.0, 0.02, "adaptive", None)


def test_predictions_are_equal_after_load(tmp_path):
    model = CASES["box"].build(AdaptiveKLPPO, **SMALL).learn(64)
    model.save(tmp_path / "model")
    observations = model.observation_space.low[None] + np.linspace(0, 1, 5)[:, None].astype(np.float32)
    expected, _ = model.predict(observations, deterministic=True)
    actual, _ = AdaptiveKLPPO.load(tmp_path / "model").predict(observations, deterministic=True)
    assert np.array_equal(actual, expected)


def test_same_seed_gives_same_run():
    runs = [CASES["box"].build(AdaptiveKLPPO, **SMALL).learn(3 * 64) for _ in range(2)]
    assert th.equal(parameters(runs[0]), parameters(runs[1]))
    assert runs[0].kl_coef == runs[1].kl_coef


def test_parameters_carry_beta():
    """And the factor of the learning rate; those of PPO do not have them."""
    case = CASES["box"]
    model, other, ppo = (case.build(algorithm, n_steps=64) for algorithm in (AdaptiveKLPPO, AdaptiveKLPPO, PPO))
    model.kl_coef, model.learning_rate_scale = 4.0, 0.5
    other.set_parameters(model.get_parameters())
    assert (other.kl_coef, other.learning_rate_scale) == (4.0, 0.5)
    ppo.set_parameters(model.get_parameters())
    other.set_parameters(ppo.get_parameters())
    assert other.kl_coef == 4.0


def test_parameters_survive_torchs_file(tmp_path):
    """``th.load`` restores tensors and plain containers only, unless it is told to trust the file."""
    case = CASES["box"]
    model, other = (case.build(AdaptiveKLPPO, n_steps=64) for _ in range(2))
    model.kl_coef = 4.0
    th.save(model.get_parameters(), tmp_path / "parameters.pt")
    other.set_parameters(th.load(tmp_path / "parameters.pt", weights_only=True))
    assert other.kl_coef == 4.0
