"""
A frozen policy, evaluated on every rollout: the distributions that the policy in training is compared with.

It is evaluated once per update, before the first step, in eval mode. It sees the observations of the training environment,
under the masks of the rollout. A policy with an LSTM has a memory of its own: what the rollout holds are the hidden states of
the policy in training.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_adaptive_kl.reference import ReferencePolicy, from_frozen_bytes, frozen_bytes, tells_probabilities
from sb3_adaptive_kl.rollout.distributions import (
    ActionDistribution,
    Categoricals,
    action_distribution,
    bijections,
    forget_distribution,
    has_closed_form,
    no_closed_form_error,
)
from sb3_adaptive_kl.rollout.evaluation import taken_actions, valid_transitions
from sb3_adaptive_kl.rollout.minibatches import preserve_random_state, through_time, to_device

# What a saved model has to tell about its policy
NEEDED = ("policy_class", "observation_space", "action_space", "policy_kwargs", "use_sde")


class Reference:
    """
    The reference policy of one model: frozen, and with a memory where it has an LSTM.

    :param spec: the argument ``reference_policy``, interpreted
    :param policy: the policy in training
    :raises ValueError: if the file cannot be read, or holds a policy of another environment
    """

    def __init__(self, spec: ReferencePolicy, policy: ActorCriticPolicy) -> None:
        self.spec = spec
        frozen: Any
        if isinstance(spec.policy, str):
            frozen, self._name = read_policy(spec.policy), repr(spec.policy)
        else:  # a copy: the original may be trained further
            frozen, self._name = from_frozen_bytes(frozen_bytes(spec.policy)), type(spec.policy).__name__
        for space in ("action_space", "observation_space"):
            its, ours = getattr(frozen, space), getattr(policy, space)
            if its != ours:
                raise ValueError(
                    f"reference_policy={self._name} has the {space} {its}, and the environment has {ours}: pass a policy of "
                    "this environment, wrapped in the same way (SB3 puts the channels of images first)"
                )
        # A policy that was loaded from its own file has None for False
        if bool(frozen.squash_output) != policy.squash_output:
            raise ValueError(
                f"reference_policy={self._name} has squash_output={frozen.squash_output}, and the policy in training "
                f"{policy.squash_output}: they are not of one family, so give both the same"
            )
        self.policy = frozen.to(policy.device)
        self.policy.requires_grad_(False)
        self.policy.set_training_mode(False)
        self._memory: tuple[th.Tensor, th.Tensor] | None = None  # hidden and cell states of its LSTM

    def on_rollout(self, buffer: RolloutBuffer, chunk_size: int) -> ActionDistribution:
        """
        Evaluate the reference on a rollout, and let its memory go on to the next one.

        :param buffer: a full rollout buffer
        :param chunk_size: transitions per forward pass, at most
        :return: its distributions at the N states, in the order of the flattened rollout
        :raises ValueError: if its distribution is not known here, or not finite
        """
        result = None
        with th.no_grad(), preserve_random_state():
            for rollout_data, index in through_time(buffer, chunk_size):
                valid = valid_transitions(rollout_data)
                masks = getattr(rollout_data, "action_masks", None)
                try:
                    distribution = self._distribution(_select(rollout_data.observations, valid), buffer, index)
                except ValueError as error:
                    raise self.invalid_error() from error
                part = _comparable(distribution, self.policy.action_space, _select(masks, valid))
                if result is None:
                    actions = taken_actions(self.policy, rollout_data)
                    if not has_closed_form(distribution, actions if valid is None else actions[valid]):
                        raise ValueError(f"reference_policy={self._name}: {no_closed_form_error(distribution)}")
                    self._bijections = bijections(distribution)
                    result = part.allocate(buffer.buffer_size * buffer.n_envs)
                result[index] = part
        forget_distribution(self.policy)
        assert result is not None  # a full rollout holds at least one transition
        if not result.kl(result).isfinite().all():  # a NaN, or a standard deviation that has underflowed to 0
            raise self.invalid_error()
        return result

    def invalid_error(self) -> ValueError:
        """Say that the reference, and not the policy in training, is why there is no finite divergence."""
        return ValueError(
            f"reference_policy={self._name} has a distribution that is not finite, or without enough spread for a finite KL "
            "divergence: train or clone it with an entropy bonus, check its file and the observations for NaN, or, if it "
            "excludes actions on purpose, pass ReferencePolicy(…, direction='forward')"
        )

    def check_comparable(self, reference: ActionDistribution, policy: ActionDistribution, action_dist: Distribution) -> None:
        """
        Check that there is a KL divergence between the reference's distributions and the policy's.

        :param reference: those of the reference
        :param policy: those of the policy in training
        :param action_dist: what they are the parameters of
        :raises ValueError: if they are of two families, or of two shapes, or transformed in two ways
        """
        reference_form, policy_form = (*_form(reference), *self._bijections), (*_form(policy), *bijections(action_dist))
        if reference_form != policy_form:
            raise ValueError(
                f"reference_policy={self._name} has {reference_form}, and the policy in training {policy_form}: there is no "
                "KL divergence between them, so pass a policy with the same action distribution (and the same numbers in its "
                "transforms)"
            )

    def _distribution(self, observations: Any, buffer: RolloutBuffer, index: th.Tensor) -> Distribution:
        shape = getattr(self.policy, "lstm_hidden_state_shape", None)
        if shape is None:
            return self.policy.get_distribution(observations)  # type: ignore[no-any-return]
        starts = buffer.episode_starts  # (T, n_envs), or flattened, as sb3-contrib's recurrent buffers do
        starts = starts if starts.shape[1] == 1 else buffer.swap_and_flatten(starts)
        shape = (shape[0], buffer.n_envs, shape[2])
        if self._memory is None or self._memory[0].shape != shape:  # the first rollout, or one of other environments
            self._memory = (th.zeros(shape, device=self.policy.device), th.zeros(shape, device=self.policy.device))
        recurrent: Any = self.policy
        episode_starts = to_device(starts, index.device)[index].flatten()
        distribution, self._memory = recurrent.get_distribution(observations, self._memory, episode_starts)
        return distribution  # type: ignore[no-any-return]


def read_policy(path: str) -> Any:
    """
    Load the policy of a saved model, or a policy saved by ``policy.save()``, on the CPU.

    :param path: with or without ``.zip``
    :return: the policy; no random numbers are drawn
    :raises ValueError: if there is no such file, or it holds something else
    """
    file = next((file for file in (Path(path), Path(f"{path}.zip")) if file.is_file()), None)
    if file is None:
        raise ValueError(
            f"reference_policy={path!r}: there is no such file in {Path.cwd()}. Pass the path of a saved model; where a model "
            "is loaded, load(…, reference_policy=…) names its new place, and reference_policy=None trains without it"
        )
    with preserve_random_state():
        try:
            with zipfile.ZipFile(file) as archive:
                saved = json.loads(archive.read("data")) if "data" in archive.namelist() else None
            policy = _of_policy(file) if saved is None else _of_model(file, saved)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ValueError(
                f"reference_policy={path!r} cannot be read ({problem}). It must be a model saved by model.save(), or one of "
                "SB3's feed-forward policies saved by policy.save(). Of others, pass the policy itself or a model's path"
            ) from error
    if not tells_probabilities(policy):
        raise ValueError(
            f"reference_policy={path!r} holds a {type(policy).__name__}, which does not tell the probabilities of its "
            "actions: pass a model of PPO, A2C, TRPO, MaskablePPO, RecurrentPPO or of an algorithm of this package"
        )
    return policy


def _of_model(file: Path, saved: dict[str, Any]) -> Any:
    # The rest, such as schedules, may need the user's code
    not_needed = dict.fromkeys(saved.keys() - set(NEEDED))
    data, parameters, _ = load_from_zip_file(file, custom_objects=not_needed, device="cpu")
    assert data is not None
    if not hasattr(data["policy_class"], "get_distribution"):
        return object.__new__(data["policy_class"])  # only to be named
    kwargs = {**data["policy_kwargs"], "lr_schedule": lambda _: 0.0}
    if data.get("use_sde"):  # MaskablePPO's policies do not have the argument
        kwargs["use_sde"] = True
    policy = data["policy_class"](data["observation_space"], data["action_space"], **kwargs)
    policy.load_state_dict(parameters["policy"])
    return policy


def _of_policy(file: Path) -> Any:
    saved = th.load(file, map_location="cpu", weights_only=False)
    if isinstance(saved, BasePolicy):  # th.save(policy), as older versions of imitation do
        return saved
    # The file tells neither its class, of which SB3's differ in what is saved alone, nor whether the critic has features of
    # its own: if they are the actor's, they are there twice
    policy = ActorCriticPolicy(**saved["data"], share_features_extractor=False)
    policy.load_state_dict(saved["state_dict"])
    return policy


def _comparable(distribution: Distribution, space: spaces.Space[Any], masks: th.Tensor | None) -> ActionDistribution:
    """Extract the parameters, masked as those of the policy in training."""
    parameters = action_distribution(distribution)
    if masks is None or not isinstance(parameters, Categoricals):
        return parameters
    from sb3_contrib.common.maskable.distributions import make_masked_proba_distribution  # only masked rollouts need it

    masked = make_masked_proba_distribution(space).proba_distribution(parameters.log_probs)
    masked.apply_masking(masks)
    return action_distribution(masked)


def _select(tensors: Any, valid: th.Tensor | None) -> Any:
    """Select the rows that are no padding, of a tensor or a dict of them."""
    if valid is None or tensors is None:
        return tensors
    return {key: tensor[valid] for key, tensor in tensors.items()} if isinstance(tensors, dict) else tensors[valid]


def _form(distribution: ActionDistribution) -> tuple[Any, ...]:
    parts = vars(distribution).values()
    shapes = [tuple(part.shape[1:]) if isinstance(part, th.Tensor) else _form(part) for part in parts]
    return type(distribution).__name__, *shapes
