"""The executor with layer sharing, and its plan of what is read from memory."""

import numpy as np
import pytest
import torch
from helpers import (
    SHARING,
    assert_logits_close,
    make_executor,
    packed_weights,
    random_ids,
    random_weights,
    run,
    tiny_config,
    transformers_logits,
    transformers_model,
)

from mobilellm_fast import quant
from mobilellm_fast.executor import Executor


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("repeats", [2, 3])
def test_layer_sharing_equals_a_loop_over_transformers_layers(sharing, repeats):
    config = tiny_config(num_hidden_layers=3, layer_sharing=sharing, layer_repeats=repeats)
    weights = random_weights(config)
    ids = random_ids(config, 30)
    with torch.no_grad():
        want = transformers_logits(config, transformers_model(config, weights), ids[None])[0]
    executor = Executor(config, packed_weights(weights), "fp32", threads=2)
    assert_logits_close(run(executor, ids), want)
    assert_logits_close(run(executor, ids, chunk=1), want)


@pytest.mark.parametrize("sharing", [False, *SHARING])
def test_200_greedy_tokens_with_the_cache_equal_those_without(sharing):
    config = tiny_config(layer_sharing=sharing)
    executor = make_executor(config)
    cache = executor.new_cache()
    ids = random_ids(config, 7).tolist()
    logits = executor.forward(ids, cache)
    for _ in range(200):
        token = int(logits[-1].argmax())
        without_cache = executor.forward(ids, executor.new_cache())
        assert token == without_cache[-1].argmax()
        ids.append(token)
        logits = executor.forward([token], cache)


def planned(cache_nbytes, **changes):
    executor = make_executor(tiny_config(**changes), "int8", cache_nbytes=cache_nbytes)
    return executor.memory_nbytes_per_token, executor.cache_nbytes_per_token


def test_plan_counts_bytes():
    base = planned(0)
    head = quant.packed_nbytes("int8", 97, 48)
    blocks = base[0] - head
    assert blocks > 0
    assert base[1] == 0
    large = 1 << 30
    assert planned(large) == base  # every block once
    assert planned(large, layer_sharing="immediate") == (head + blocks, blocks)
    assert planned(large, layer_sharing="immediate", layer_repeats=3) == (head + blocks, 2 * blocks)
    # too large to stay for the second pass
    assert planned(100, layer_sharing="immediate") == (head + 2 * blocks, 0)
    # only the turning point runs a block twice in a row
    assert planned(large, layer_sharing="repeat_all") == (head + 2 * blocks, 0)
    assert planned(large, layer_sharing="reverse") == (head + 3 * blocks // 2, blocks // 2)


def test_plan_does_not_change_results():
    config = tiny_config(layer_sharing="immediate", num_hidden_layers=4)
    ids = random_ids(config, 20)
    results = [
        run(make_executor(config, "int4", cache_nbytes=n), ids) for n in (0, 20_000, 1 << 30)
    ]
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
