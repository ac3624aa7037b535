"""A diverged update is undone and reported, and ends the run if it goes on: never a silently stuck or NaN policy."""

import math
import warnings

import pytest
import torch as th
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_adaptive_kl import AdaptiveKLPPO, AdaptivePenalty, objective, step
from sb3_adaptive_kl.training import MAX_UNDONE_IN_A_ROW
from tests.conftest import CASES, FAMILIES, collect, logged, parameters
from tests.test_policies import NoisyExtractor

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}


def optimizer_state(model):
    states = model.policy.optimizer.state_dict()["state"].values()
    return [state[name].clone() for state in states for name in sorted(state)]


def with_nan_loss(monkeypatch):
    monkeypatch.setattr(objective, "surrogate_loss", lambda advantages, ratio, clip_range: ratio.mean() * th.nan)


@pytest.mark.parametrize("case", FAMILIES)
def test_nan_loss_is_undone(case, monkeypatch):
    model = FAMILIES[case].build(AdaptiveKLPPO, **SMALL).learn(64)  # so that the optimizer has a state
    model = collect(model)
    model.kl_coef = 1.0
    with_nan_loss(monkeypatch)
    before, state_before = parameters(model), optimizer_state(model)

    with pytest.warns(
        UserWarning, match=r"non-finite KL divergence, gradient or parameter and was undone.*lower learning_rate"
    ):
        model.train()

    assert th.equal(parameters(model), before)
    assert all(th.equal(now, then) for now, then in zip(optimizer_state(model), state_before, strict=True))
    assert model.kl_coef == 2.0
    assert logged(model)["undone_updates"] == 1
    monkeypatch.undo()
    collect(model).train()  # and goes on
    assert not th.equal(parameters(model), before)
    assert model._undone_in_a_row == 0


def test_first_update_of_all_is_undone(monkeypatch):
    """Before the first step the optimizer has no state at all; afterwards it must have none again."""
    with_nan_loss(monkeypatch)
    model = collect(CASES["discrete"].build(AdaptiveKLPPO, **SMALL))
    before = parameters(model)
    with pytest.warns(UserWarning, match="undone"):
        model.train()
    assert th.equal(parameters(model), before)
    assert optimizer_state(model) == []


def test_parameter_lost_where_the_kl_cannot_see_it(monkeypatch):
    """The value function overflows in the last step: the KL is finite, and the loss was."""
    model = collect(CASES["box"].build(AdaptiveKLPPO, **SMALL))
    before, step = parameters(model), model.policy.optimizer.step

    def overflowing_step():
        step()
        with th.no_grad():
            model.policy.value_net.bias.fill_(th.inf)

    monkeypatch.setattr(model.policy.optimizer, "step", overflowing_step)
    monkeypatch.setattr(objective, "value_loss", lambda *args: th.zeros((), requires_grad=True))
    with pytest.warns(UserWarning, match="undone"):
        model.train()
    assert math.isfinite(logged(model)["kl"])
    assert th.equal(parameters(model), before)


def test_statistics_of_a_batch_normalization_are_those_before_an_undone_update(monkeypatch):
    monkeypatch.setattr(objective, "surrogate_loss", lambda advantages, ratio, clip_range: ratio.mean() * th.nan)
    model = collect(CASES["box"].build(AdaptiveKLPPO, policy_kwargs={"features_extractor_class": NoisyExtractor}, **SMALL))
    before = [buffer.clone() for buffer in model.policy.buffers()]
    with pytest.warns(UserWarning, match="undone"):
        model.train()
    assert before
    assert all(map(th.equal, before, model.policy.buffers()))


def test_step_of_length_zero_is_not_taken_for_a_sound_one(monkeypatch):
    """A gradient norm beyond float32 is clipped to 0: nothing would ever move, and nothing would be NaN."""
    monkeypatch.setattr(objective, "surrogate_loss", lambda advantages, ratio, clip_range: 1e30 * ratio.mean())
    model = collect(CASES["box"].build(AdaptiveKLPPO, normalize_advantage=False, **SMALL))
    with pytest.warns(UserWarning, match="undone"):
        model.train()


def test_constant_minus_infinity_is_no_divergence():
    """As in the mask of an attention layer; nor does a module's extra state confuse the checkpoint."""

    class Masked(th.nn.Linear):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer("mask", th.full((4, 4), -th.inf).triu(1))

        def get_extra_state(self):
            return {"version": 1}

        def set_extra_state(self, state):
            pass

    model = CASES["box"].build(AdaptiveKLPPO, **SMALL)
    model.policy.action_net.masked = Masked(1, 1)
    model.learn(2 * 64)
    assert logged(model)["undone_updates"] == 0


@pytest.mark.parametrize("kl_divergence", ["forward", "k3"])
def test_gives_up_after_several_in_a_row(monkeypatch, kl_divergence):
    with_nan_loss(monkeypatch)
    model = CASES["discrete"].build(AdaptiveKLPPO, kl_divergence=kl_divergence, **SMALL)
    before = parameters(model)
    with (
        pytest.warns(UserWarning, match="undone"),
        pytest.raises(ValueError, match=r"5 updates in a row.*produced a non-finite KL.*=0.0003.*VecNormalize"),
    ):
        model.learn(64 * (MAX_UNDONE_IN_A_ROW + 1))
    assert model.num_timesteps == 64 * MAX_UNDONE_IN_A_ROW
    assert logged(model)["undone_updates"] == MAX_UNDONE_IN_A_ROW
    assert th.equal(parameters(model), before)
    assert model.kl_coef == 2.0**MAX_UNDONE_IN_A_ROW


def test_undone_updates_are_counted_afresh_after_the_error(monkeypatch):
    with_nan_loss(monkeypatch)
    model = CASES["discrete"].build(AdaptiveKLPPO, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(2):
            for _ in range(MAX_UNDONE_IN_A_ROW - 1):
                collect(model).train()
            with pytest.raises(ValueError, match="updates in a row"):
                collect(model).train()


def test_one_infinite_gradient_among_finite_ones_is_undone(monkeypatch):
    """Its step has length 0, and the next steps are finite."""
    model = collect(CASES["box"].build(AdaptiveKLPPO, **SMALL))
    compute_gradients, norms = step.compute_gradients, iter([1.0, math.inf, 1.0, 1.0])

    def infinite_once(*args):
        metrics, _ = compute_gradients(*args)
        return metrics, th.tensor(next(norms))

    monkeypatch.setattr(step, "compute_gradients", infinite_once)
    with pytest.warns(UserWarning, match="undone"):
        model.train()


@pytest.mark.parametrize("normalize_advantage", [True, False])
@pytest.mark.parametrize("case", FAMILIES)
def test_absurd_learning_rate_never_leaves_nan(case, normalize_advantage):
    """With Adam at a learning rate of 10 some updates overflow, others only ruin the policy: it stays finite, β is told."""
    measured = []

    def rule(kl_coef, kl, target_kl):
        measured.append(kl)
        return AdaptivePenalty()(kl_coef, kl, target_kl)

    model = FAMILIES[case].build(
        AdaptiveKLPPO, learning_rate=10.0, kl_rule=rule, normalize_advantage=normalize_advantage, **SMALL
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            model.learn(8 * 64)
        except ValueError as error:
            assert "learning_rate=10" in str(error)  # noqa: PT017  both outcomes are sound, and both are told
    assert th.isfinite(parameters(model)).all()
    assert max(measured) > 100 * model.target_kl
    assert not any(math.isnan(kl) for kl in measured)


def test_other_errors_are_not_taken_for_divergence():
    """A ValueError of the user's policy in training mode is the user's to see."""

    class Refuses(th.nn.Identity):
        def forward(self, x):
            if self.training:
                raise ValueError("Expected more than 1 value per channel when training")
            return x

    model = collect(CASES["discrete"].build(AdaptiveKLPPO, **SMALL))
    model.policy.mlp_extractor.policy_net.append(Refuses())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.train()


def test_warns_once_at_the_upper_bound():
    model = CASES["box"].build(AdaptiveKLPPO, learning_rate=0.1, kl_coef_bounds=(0.5, 2.0), target_kl=1e-4, **SMALL)
    with pytest.warns(UserWarning, match=r"upper bound 2 for 10.*target_kl 0.0001\..*lower learning_rate") as caught:
        model.learn(15 * 64)
    assert len(caught) == 1


def test_warns_once_at_the_lower_bound():
    model = CASES["box"].build(AdaptiveKLPPO, learning_rate=1e-7, **SMALL)
    with pytest.warns(UserWarning, match=r"lower bound 0.03125 for 10.*target_kl 0.02\..*raise learning_rate") as caught:
        model.learn(15 * 64)
    assert len(caught) == 1


def test_alternating_between_the_bounds_is_no_reason_to_warn():
    """Twelve rollouts in a row against a bound, but not against one and the same."""
    targets = iter([1e-9, 1e9] * 6)
    model = CASES["box"].build(AdaptiveKLPPO, kl_coef_bounds=(1.0, 1.0), target_kl=lambda progress: next(targets), **SMALL)
    model.learn(12 * 64)  # warnings are errors here


def test_fixed_penalty_at_a_bound_is_no_reason_to_warn():
    model = CASES["box"].build(AdaptiveKLPPO, learning_rate=1e-7, kl_rule="fixed", init_kl_coef=32.0, **SMALL)
    model.learn(12 * 64)  # warnings are errors here
    assert model.kl_coef == 32.0


def with_nan_observation(model):
    model.rollout_buffer.observations[5] = math.nan
    return model


@pytest.mark.parametrize("kl_divergence", ["forward", "reverse", "k3"])
@pytest.mark.parametrize("case", ["box", "gsde", "gsde-squashed"])
def test_nan_observation_is_caught_without_torchs_checks(case, kl_divergence):
    """One NaN among 64 observations: torch's distributions do not refuse it during an update, so the guard must."""
    model = with_nan_observation(collect(FAMILIES[case].build(AdaptiveKLPPO, kl_divergence=kl_divergence, **SMALL)))
    before = parameters(model)
    with pytest.warns(UserWarning, match="was undone.*observations are extreme or NaN"):
        model.train()
    assert th.equal(parameters(model), before)
    assert model.kl_coef == 2.0


def test_checks_are_dropped_for_the_update_only():
    """Of this policy, during train(), and in no other thread."""
    model = collect(CASES["discrete"].build(AdaptiveKLPPO, **SMALL))
    seen = []

    def refused(*args):
        with pytest.raises(ValueError, match="Expected parameter"):
            th.distributions.Normal(th.tensor(math.nan), th.tensor(1.0))
        seen.append(args)

    model.policy.action_net.register_forward_hook(refused)
    model.train()
    assert seen
    assert type(model.policy.action_dist.distribution) is th.distributions.Categorical
    assert model.policy.action_dist.distribution._validate_args is False
    assert "proba_distribution" not in vars(model.policy.action_dist)
    assert th.distributions.Distribution._validate_args is True
    with pytest.raises(ValueError, match="Expected parameter"):
        model.policy.action_dist.proba_distribution(th.full((1, 4), math.nan))


def test_warnings_point_at_the_line_that_trains(monkeypatch):
    with_nan_loss(monkeypatch)
    model = CASES["discrete"].build(AdaptiveKLPPO, **SMALL)
    with pytest.warns(UserWarning, match="undone") as caught:
        model.learn(64)
    assert {warning.filename for warning in caught if "undone" in str(warning.message)} == {__file__}


class AlwaysRandom(FlattenExtractor):
    """Dropout as a function, which is on in eval mode, too."""

    def forward(self, observations):
        return th.nn.functional.dropout(super().forward(observations), 0.5)


@pytest.mark.parametrize("kl_divergence", ["forward", "k3"])
def test_a_policy_that_is_random_in_eval_mode_is_named(kl_divergence):
    """Also where its actions hardly depend on the observation at first, as in SB3's policies."""
    kwargs = {"policy_kwargs": {"features_extractor_class": AlwaysRandom}, "kl_divergence": kl_divergence, **SMALL}
    model = CASES["box"].build(AdaptiveKLPPO, learning_rate=0.01, **kwargs)
    with pytest.warns(UserWarning, match=r"KL divergence differs by .* random in eval mode.*F.dropout") as caught:
        model.learn(5 * 64)
    assert len(caught) == 1


def test_an_undone_update_is_told_once_before_the_error(monkeypatch):
    with_nan_loss(monkeypatch)
    model = CASES["discrete"].build(AdaptiveKLPPO, **SMALL)
    with pytest.warns(UserWarning, match="undone") as caught, pytest.raises(ValueError, match="5 updates in a row"):
        model.learn(64 * MAX_UNDONE_IN_A_ROW)
    assert len(caught) == 1


class RaisesLater(FlattenExtractor):
    """Works until the first minibatch of an update."""

    broken = False

    def forward(self, observations):
        self.broken |= th.is_grad_enabled() and self.training
        if self.broken:
            raise ValueError("the sensor is broken")
        return super().forward(observations)


def test_an_error_of_the_users_network_is_told():
    model = CASES["box"].build(AdaptiveKLPPO, policy_kwargs={"features_extractor_class": RaisesLater}, **SMALL)
    with pytest.warns(UserWarning, match=r"was undone.*") as caught:
        model.learn(64)
    assert "the sensor is broken" in str(caught[0].message)
