"""
Sequences through an LSTM all at once, and without padding everything else.

sb3-contrib's policies run an LSTM step by step wherever an episode begins in a minibatch. Its buffers begin a sequence there,
so that only first steps are episode starts: their hidden states are set to zero, and one call then does all steps. Features,
heads and losses are those of the minibatch's own transitions; the LSTM alone is given padded blocks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl.rollout.distributions import is_stock, replaced
from sb3_adaptive_kl.rollout.minibatches import to_device

# Modules whose _get_samples pads sequences, and does nothing else
PADDING = ("sb3_contrib.common.recurrent.buffers", "sb3_adaptive_kl.maskable_recurrent.buffers")
# The methods that evaluate actions; this package's own only add masks
EVALUATING = ("evaluate_actions", "extract_features", "_get_action_dist_from_latent", "_process_sequence")
# Cells of a padded block for each transition in it, at most
MAX_CELLS = 2

LSTMStates = tuple[th.Tensor, th.Tensor]


class Block(NamedTuple):
    """Steps of all sequences that are not over when it begins: ``n_steps × n_sequences`` cells, some of them padding."""

    n_steps: int
    n_sequences: int
    rows: th.Tensor  # the transitions in it, by their place in the minibatch
    cells: th.Tensor  # and by their place in the flattened block


class Sequences(NamedTuple):
    """How the transitions of a minibatch are put into blocks for an LSTM. Sequences are sorted, the longest first."""

    begins: th.Tensor  # 1 where the first step of a sequence begins an episode, else 0: shape (1, n_sequences, 1)
    blocks: list[Block]


@contextmanager
def sequences_at_once(policy: ActorCriticPolicy, buffer: Any) -> Iterator[None]:
    """
    Let stock LSTM policies evaluate sequences all at once, and stock buffers draw them without padding.

    :param policy: any policy; one of the user's that overrides what is replaced here runs its own code
    :param buffer: the rollout buffer that it is trained on; one that pads in its own way goes on doing so
    """
    draws_stock = all(is_stock(buffer, name, PADDING) for name in ("get", "_get_samples"))
    evaluates_stock = all(is_stock(policy, name) for name in EVALUATING)
    # A critic may have none of its own. A subclass of the user's may need to see one step at a time
    lstms = {type(getattr(policy, name, None)) for name in ("lstm_actor", "lstm_critic")}
    if not (draws_stock and evaluates_stock and lstms <= {th.nn.LSTM, type(None)}):
        yield
        return
    step_by_step = policy._process_sequence

    def process_sequence(features: th.Tensor, states: LSTMStates, starts: Any, lstm: th.nn.LSTM) -> Any:
        # A rule may ask the policy something during an update
        process: Any = in_blocks if isinstance(starts, Sequences) else step_by_step
        return process(features, states, starts, lstm)

    with replaced(policy, _process_sequence=process_sequence), replaced(buffer, _get_samples=partial(unpadded, buffer)):
        yield


def in_blocks(
    features: th.Tensor, lstm_states: LSTMStates, sequences: Sequences, lstm: th.nn.LSTM
) -> tuple[th.Tensor, LSTMStates]:
    """
    Run an LSTM over the sequences of a minibatch.

    :param features: shape (B, n_features)
    :param lstm_states: hidden and cell states where the sequences begin, shape (n_layers, n_sequences, hidden size) each
    :param sequences: where the B transitions belong
    :param lstm: the LSTM
    :return: its outputs, shape (B, hidden size), and its states after the last block
    """
    hidden, cell = ((1.0 - sequences.begins) * state for state in lstm_states)
    outputs = features.new_zeros(len(features), lstm.hidden_size)
    # Sequences are sorted by length: those that go on into the next block are the first ones of this
    for n_steps, n_sequences, rows, cells in sequences.blocks:
        padding = features.new_zeros(n_steps * n_sequences, lstm.input_size)
        padded = padding.index_copy(0, cells, features.index_select(0, rows))
        states = hidden[:, :n_sequences].contiguous(), cell[:, :n_sequences].contiguous()
        output, (hidden, cell) = lstm(padded.view(n_steps, n_sequences, -1), states)
        outputs = outputs.index_copy(0, rows, output.flatten(0, 1).index_select(0, cells))
    return outputs, (hidden, cell)


def unpadded(buffer: Any, batch_inds: np.ndarray, env_change: np.ndarray, env: Any = None) -> Any:
    """
    Draw what a recurrent buffer draws, without padding.

    :param buffer: a full one of sb3-contrib, or one with masks
    :param batch_inds: the transitions, those of an episode in their order
    :param env_change: 1 for the first step of each environment, shape (N, 1)
    :param env: not used, as by sb3-contrib
    :return: the buffer's samples of these transitions, in this order; ``episode_starts`` are ``Sequences``, ``mask`` is None
    """
    # Not at module level: whoever draws from contrib's buffer has contrib, others need not
    from sb3_contrib.common.recurrent.type_aliases import RecurrentRolloutBufferSamples, RNNStates

    episode_starts = buffer.episode_starts[batch_inds].flatten()
    begins = (episode_starts != 0) | (env_change[batch_inds].flatten() != 0)
    begins[0] = True
    (first,) = np.nonzero(begins)
    lengths = np.diff([*first, len(batch_inds)])
    order = np.argsort(-lengths, kind="stable")
    first, lengths = first[order], lengths[order]

    def states(network: str) -> Any:
        # (N, n_layers, hidden size) -> (n_layers, n_sequences, hidden size)
        arrays = (getattr(buffer, f"{kind}_states_{network}") for kind in ("hidden", "cell"))
        return tuple(buffer.to_torch(array[batch_inds[first]].swapaxes(0, 1)).contiguous() for array in arrays)

    unpadding: Any = DictRolloutBuffer if isinstance(buffer, DictRolloutBuffer) else RolloutBuffer
    drawn: Any = unpadding._get_samples(buffer, batch_inds)  # as SB3's feed-forward policies get them
    sequences: Any = into_blocks(first, lengths, episode_starts[first], buffer.device)
    states_of_both = RNNStates(states("pi"), states("vf"))
    samples = RecurrentRolloutBufferSamples(*drawn, states_of_both, sequences, None)  # type: ignore[call-arg]
    if not hasattr(buffer, "action_masks"):
        return samples
    from sb3_adaptive_kl.maskable_recurrent.buffers import MaskableRecurrentRolloutBufferSamples

    return MaskableRecurrentRolloutBufferSamples(*samples, action_masks=buffer.to_torch(buffer.action_masks[batch_inds]))


def into_blocks(first: np.ndarray, lengths: np.ndarray, begins: np.ndarray, device: th.device) -> Sequences:
    """
    Arrange sequences in blocks of at most ``MAX_CELLS`` cells for each transition. One long sequence among many short ones
    would otherwise need a block that is quadratic in their number.

    :param first: the first transition of each sequence
    :param lengths: their lengths, in descending order
    :param begins: whether an episode begins there
    :param device: where the LSTM is
    :return: the arrangement. Each block holds at most half as many sequences as the one before
    """
    # Sequences that have a step t, for each t
    n_active = len(lengths) - np.cumsum(np.bincount(lengths))[:-1]
    blocks, start = [], 0
    while start < len(n_active):
        active = n_active[start:]
        n_sequences = int(active[0])
        # As many steps as still keep the padding within the limit. The first always does: it has none
        n_cells = n_sequences * np.arange(1, len(active) + 1)
        end = start + int(np.count_nonzero(n_cells <= MAX_CELLS * np.cumsum(active)))
        # A block is flattened with time first, as an LSTM reads it
        steps = np.arange(start, end)[:, None]
        (cells,) = np.nonzero((steps < lengths[:n_sequences]).flatten())
        rows = (first[:n_sequences] + steps).flatten()[cells]
        blocks.append(Block(end - start, n_sequences, to_device(rows, device), to_device(cells, device)))
        start = end
    return Sequences(to_device(begins.astype(np.float32), device).view(1, -1, 1), blocks)
