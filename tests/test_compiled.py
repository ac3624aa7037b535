"""compile=True takes the same steps, compiles once, falls back with one warning, and leaves no trace in checkpoints."""

import copy
import warnings

import numpy as np
import pytest
import torch as th
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3 import PPO
from stable_baselines3.common.envs import IdentityEnv
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule

from sb3_adaptive_kl import AdaptiveKLPPO, MaskableAdaptiveKLPPO, PredictivePenalty, RecurrentAdaptiveKLPPO, ReferencePolicy
from tests.conftest import CASES, NEEDS_COMPILER, Case, collect, logged, parameters, remember

pytestmark = NEEDS_COMPILER
# 60 = 24 + 24 + 12: every epoch ends with a shorter minibatch
SMALL = {"n_steps": 60, "batch_size": 24, "n_epochs": 2}
EVERYTHING = {
    "learning_rate": LinearSchedule(1e-3, 1e-4, 1.0),
    "target_kl": LinearSchedule(0.02, 0.01, 1.0),
    "clip_range": LinearSchedule(0.3, 0.1, 1.0),
    "clip_range_vf": 0.2,
    "ent_coef": 0.01,
    "kl_cutoff_coef": 100.0,
    "reference_policy": ReferencePolicy(CASES["box"].build(PPO, seed=1).policy, target_kl=1e-3),
}
OPTIMIZERS = {
    "adamw": {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1, "amsgrad": True}},
    "rmsprop": {"optimizer_class": th.optim.RMSprop},
}


@pytest.fixture(autouse=True)
def _truncated_minibatches():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You have specified a mini-batch size")
        yield


def n_compilations():
    return th._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_same_trajectory(case, algorithm=AdaptiveKLPPO, n_iterations=10, **kwargs):
    eager, compiled = (
        case.build(algorithm, compile=compile, **{**SMALL, **kwargs}).learn(n_iterations * 60) for compile in (False, True)
    )
    assert not compiled._compiler.failed
    assert (parameters(eager) - parameters(compiled)).abs().max() < 1e-4
    assert eager.kl_coef == compiled.kl_coef
    assert eager._n_updates == compiled._n_updates
    theirs, ours = logged(eager), logged(compiled)
    assert theirs.keys() == ours.keys()
    for key in theirs:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-2, abs=1e-4), key


def test_same_trajectory_with_everything_switched_on():
    assert_same_trajectory(CASES["box"], n_steps=48, **EVERYTHING)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gsde", "gsde-expln", "gsde-squashed", "discrete", "multidiscrete", "multibinary"])
def test_same_trajectory_for_every_family(case):
    assert_same_trajectory(CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["cnn", "cnn-continuous", "dict", "separate-extractors"])
def test_same_steps_on_images(case):
    """A rounding error soon flips an action here: so one update, whose first step alone is not compiled."""
    eager, compiled = (CASES[case].build(AdaptiveKLPPO, compile=compile, **SMALL).learn(60) for compile in (False, True))
    assert not compiled._compiler.failed
    assert (parameters(eager) - parameters(compiled)).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_same_trajectory_with_other_optimizers(optimizer):
    assert_same_trajectory(CASES["box"], n_iterations=4, policy_kwargs=OPTIMIZERS[optimizer])


@pytest.mark.slow
@pytest.mark.parametrize("kl_divergence", ["reverse", "k3"])
def test_same_trajectory_with_early_stop(kl_divergence):
    kwargs = {"kl_stop_factor": 1.0, "learning_rate": 3e-3, "n_epochs": 6}
    assert_same_trajectory(CASES["box"], n_iterations=4, kl_divergence=kl_divergence, **kwargs)


@pytest.mark.slow
def test_same_trajectory_with_masks():
    case = Case("MlpPolicy", lambda: InvalidActionEnvDiscrete(dim=6, n_invalid_actions=3))
    assert_same_trajectory(case, MaskableAdaptiveKLPPO, n_iterations=4)


@pytest.mark.usefixtures("compiler")
class TestBox:
    """One small network."""

    def test_first_update_equals_ppos(self):
        """See test_first_update.py. This is the second update: the optimizer has a state."""
        full_batch = {"n_steps": 64, "batch_size": 64, "n_epochs": 1, "learning_rate": 0.01}
        ppo = CASES["box"].build(PPO, **full_batch).learn(64)
        ours = CASES["box"].build(AdaptiveKLPPO, compile=True, init_kl_coef=30.0, **full_batch).learn(64)
        ours.set_parameters(copy.deepcopy(ppo.get_parameters()))
        ours.kl_coef = 30.0
        ours.rollout_buffer = collect(ppo).rollout_buffer
        start = parameters(ours)
        ppo.train()
        ours.train()
        assert not ours._compiler.failed
        assert (parameters(ours) - start).abs().max() > 1e-3
        assert (parameters(ours) - parameters(ppo)).abs().max() < 1e-6

    def test_compiles_once(self):
        """No schedule, no β that changes, no annealing callback, no shorter last minibatch compiles again at every update."""
        model = CASES["box"].build(AdaptiveKLPPO, compile=True, **SMALL, **EVERYTHING)
        seconds = []
        betas, reference_coefs = set(), set()
        before = n_compilations()
        for iteration in range(4):
            collect(model)
            model.ent_coef, model.vf_coef, model.max_grad_norm = 0.1 / (1 + iteration), 0.5 + iteration, 1.0 + iteration
            model.kl_cutoff_coef = 100.0 + iteration
            model.train()
            betas.add(model.kl_coef)
            reference_coefs.add(model.reference_kl_coef)
            seconds.append(model.logger.name_to_value.get("time/compilation"))
        assert n_compilations() - before == 3  # to act, and for both sizes of minibatch
        assert len(betas) > 1
        assert len(reference_coefs) > 1
        assert seconds[0] > 0
        assert seconds[1:] == [None] * 3  # told once

    def test_many_models_in_one_process(self):
        """torch limits recompilations per function: each model has a limit of its own."""
        for _ in range(3):
            model = collect(CASES["box"].build(AdaptiveKLPPO, compile=True, n_steps=60, batch_size=60))
            with th._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=2):
                model.train()
            assert not model._compiler.failed
        assert th.distributions.Distribution._validate_args is True  # which torch turns off when it compiles

    def test_checkpoints_do_not_see_it(self, tmp_path):
        eager, model = (CASES["box"].build(AdaptiveKLPPO, compile=compile, **SMALL).learn(2 * 60) for compile in (False, True))
        model.save(tmp_path / "model")
        loaded = AdaptiveKLPPO.load(tmp_path / "model", env=model.get_env())
        assert loaded.compile is True
        data, _, _ = load_from_zip_file(tmp_path / "model")
        assert "_compiler" not in data
        assert th.equal(parameters(loaded), parameters(model))
        ours, theirs = model.get_parameters(), eager.get_parameters()
        assert ours["policy"].keys() == theirs["policy"].keys()
        assert ours["policy.optimizer"]["param_groups"] == theirs["policy.optimizer"]["param_groups"]
        assert vars(model.policy).keys() == vars(eager.policy).keys()
        assert model.policy.observation_space == eager.policy.observation_space
        assert not th._dynamo.config.trace_autograd_ops

    def test_a_copy_trains_itself(self):
        model = collect(CASES["box"].build(AdaptiveKLPPO, compile=True, **SMALL).learn(60))
        copied = copy.deepcopy(model)
        start = parameters(model)
        copied.train()
        assert th.equal(parameters(model), start)
        assert not th.equal(parameters(copied), start)

    def test_diverged_update_is_undone(self):
        model = collect(CASES["box"].build(AdaptiveKLPPO, compile=True, **SMALL).learn(60))
        model.rollout_buffer.observations[3] = th.nan
        before = parameters(model)
        with pytest.warns(UserWarning, match="was undone"):
            model.train()
        assert not model._compiler.failed
        assert th.equal(parameters(model), before)

    def test_policy_is_itself_while_compiled_steps_run(self):
        """A rule that acts within the update may evaluate it: with its own space, at which an unmoved policy has a KL of 0."""
        seen = []

        class Curious(PredictivePenalty):
            def within_update(self, kl_coef, kl, *args):
                seen.append((model.policy.observation_space, old_policy.kl().mean))
                return kl_coef

        case = Case("MlpPolicy", lambda: IdentityEnv(dim=3))
        model = collect(case.build(AdaptiveKLPPO, compile=True, kl_rule=Curious(), learning_rate=0.0, **SMALL))
        old_policy = remember(model)
        model.train()
        assert not model._compiler.failed
        assert seen
        assert all(space == model.observation_space and kl < 1e-12 for space, kl in seen)

    def test_freezing_and_thawing_the_network(self):
        """In the midst of a run: what is frozen rests, and moves again when it is thawed."""
        model = CASES["box"].build(AdaptiveKLPPO, compile=True, **SMALL)
        layers = model.policy.mlp_extractor.policy_net
        for frozen in (True, False, True):
            layers.requires_grad_(not frozen)
            before = layers[0].weight.clone()
            model.learn(2 * 60)
            assert th.equal(layers[0].weight, before) == frozen
        assert not model._compiler.failed

    def test_normalization_may_be_switched_off_and_on(self):
        """Both ways are compiled once each: going back compiles nothing again."""
        model = CASES["box"].build(AdaptiveKLPPO, compile=True, n_steps=60, batch_size=60).learn(60)
        counts = []
        for normalize in (True, False, True, False):
            before = n_compilations()
            model.normalize_advantage, model.kl_coef_bounds = normalize, (1 / 32, 32.0)
            collect(model).train()
            counts.append(n_compilations() - before)
        assert counts == [0, 1, 0, 0]


SCALE = 1.0


class Scaled(FlattenExtractor):
    def forward(self, observations):
        return SCALE * super().forward(observations)


@pytest.mark.usefixtures("compiler")
def test_globals_of_the_users_code_may_change(monkeypatch):
    case = Case("MlpPolicy", CASES["box"].make_env, {"policy_kwargs": {"features_extractor_class": Scaled}})
    model = collect(case.build(AdaptiveKLPPO, compile=True, **SMALL))
    assert len(np.unique(model.rollout_buffer.values)) > 10
    monkeypatch.setattr(f"{__name__}.SCALE", 0.0)
    assert len(np.unique(collect(model).rollout_buffer.values)) == 1
    assert not model._compiler.failed


class AsksForTheSpace(ActorCriticPolicy):
    def _get_action_dist_from_latent(self, latent_pi):
        return super()._get_action_dist_from_latent(latent_pi * self.observation_space.shape[0])


class Curious(th.nn.Module):
    """Python that depends on the values of a tensor."""

    def forward(self, x):
        if x.sum() > 1e9:
            raise RuntimeError("never")
        return x


class CuriousNetwork(ActorCriticPolicy):
    def _build_mlp_extractor(self):
        super()._build_mlp_extractor()
        self.mlp_extractor.policy_net.append(Curious())


class CuriousMethods(ActorCriticPolicy):
    """What is the user's own forward is left alone while a rollout is collected."""

    curious = Curious()

    def forward(self, obs, deterministic=False):
        return super().forward(self.curious(obs), deterministic)

    def evaluate_actions(self, obs, actions):
        return super().evaluate_actions(self.curious(obs), actions)


def assert_falls_back(message, policy="MlpPolicy", algorithm=AdaptiveKLPPO, **kwargs):
    """With one warning, and to the bit."""
    case = Case(policy, CASES["box"].make_env, kwargs)
    compiled = case.build(algorithm, compile=True, **SMALL)
    with pytest.warns(UserWarning, match=message) as caught:
        compiled.learn(3 * 60)
    assert len([warning for warning in caught if "compile=True" in str(warning.message)]) == 1
    assert compiled._compiler.failed
    eager = case.build(algorithm, **SMALL).learn(3 * 60)
    assert th.equal(parameters(compiled), parameters(eager))


@pytest.mark.parametrize("policy", [CuriousNetwork, CuriousMethods])
def test_falls_back_where_python_depends_on_data(policy):
    assert_falls_back("compile=True: torch.compile cannot be used.*[Dd]ata-dependent", policy)


@pytest.mark.usefixtures("compiler")
def test_policy_may_ask_for_its_space():
    """It must not be told another one, with which observations that are preprocessed already are left as they are."""
    assert_same_trajectory(Case(AsksForTheSpace, CASES["box"].make_env), n_iterations=4)


def test_falls_back_where_compiling_is_switched_off():
    import torch._dynamo

    with torch._dynamo.config.patch(disable=True):
        assert_falls_back("compile=True: torch.compile cannot be used.*TORCH_COMPILE_DISABLE")


@pytest.mark.usefixtures("compiler")
def test_falls_back_where_shapes_change_too_often():
    """A callback asks the policy about batches of many sizes."""

    def ask(*_):
        with th.no_grad():
            for n in range(2, 6):
                model.policy(th.zeros(n, 3))
        return True

    model = CASES["box"].build(AdaptiveKLPPO, compile=True, **SMALL)
    with (
        th._dynamo.config.patch(recompile_limit=3),
        pytest.warns(UserWarning, match="compile=True: torch.compile cannot be used.*Recompiled too often") as caught,
    ):
        model.learn(60, callback=ask)
    assert len([warning for warning in caught if "compile=True" in str(warning.message)]) == 1
    assert model._n_updates > 0


def test_falls_back_for_lstms():
    """sb3-contrib asks the tensors where episodes begin."""
    lstm = {"policy_kwargs": {"lstm_hidden_size": 8}}
    assert_falls_back("compile=True: torch.compile cannot be used", "MlpLstmPolicy", RecurrentAdaptiveKLPPO, **lstm)


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_falls_back_without_a_compiler():
    import torch._inductor.config

    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        assert_falls_back("compile=True: torch.compile cannot be used.*[Cc]ompiler")
