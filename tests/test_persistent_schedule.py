"""Who reads what when in the persistent kernel, simulated: nothing is lost, nobody waits for ever.

A program polls vectors of words, each with the epoch of the stage that wrote it, and never looks
back. Two things could go wrong in some order of events: a word is written again before somebody
has seen it, who then polls for ever; or what was stored without an epoch, keys and values, is read
before it is safe. The simulation moves one program at a time, chosen by an adversary, and checks
both. It follows the order of calls in `kernels/decode/persistent.py`.
"""

import random

import pytest

LAYERS, STEPS = 3, 3
HEADS = 2


def share_of(count, program, programs):
    return range(program * count // programs, (program + 1) * count // programs)


class Grid:
    """Memory that programs share: vectors of epochs, arrivals at the barrier, the KV cache."""

    def __init__(self, programs, hidden, inner):
        self.programs = programs
        self.sizes = {
            "x": hidden,
            "middle": hidden,
            "qkv": hidden + 3,
            "attended": HEADS,
            "inner": inner,
        }
        self.epochs = {name: [0] * size for name, size in self.sizes.items()}
        self.arrived = 0
        self.stored = {}  # (layer, step) -> barriers passed when keys and values were stored
        self.candidates = {}

    def publish(self, name, program, epoch):
        for index in share_of(self.sizes[name], program, self.programs):
            assert self.epochs[name][index] < epoch
            self.epochs[name][index] = epoch

    def received(self, name, epoch):
        """Tell whether all of a vector is there; fail if some of it is gone."""
        newest = max(self.epochs[name])
        assert newest <= epoch, f"{name} of stage {epoch} was overwritten by stage {newest}"
        return min(self.epochs[name]) == epoch


def program(grid, me):
    """The life of one program; yields what it waits for, a condition."""

    def receive(name, epoch):
        return lambda: grid.received(name, epoch)

    epoch = 1
    for step in range(STEPS):
        grid.publish("x", me, epoch)
        for layer in range(LAYERS):
            yield receive("x", epoch)
            grid.publish("qkv", me, epoch + 1)
            grid.stored.setdefault((layer, step), []).append(step)
            if me < HEADS:
                yield receive("qkv", epoch + 1)
                for earlier in range(step):  # what other programs stored, a barrier ago
                    written = grid.stored[layer, earlier]
                    assert len(written) == grid.programs
                    assert all(barriers < step for barriers in written)
                for head in range(me, HEADS, grid.programs):
                    assert grid.epochs["attended"][head] < epoch + 2
                    grid.epochs["attended"][head] = epoch + 2
            yield receive("x", epoch)  # the residual
            yield receive("attended", epoch + 2)
            grid.publish("middle", me, epoch + 3)
            yield receive("middle", epoch + 3)
            grid.publish("inner", me, epoch + 4)
            yield receive("middle", epoch + 3)
            yield receive("inner", epoch + 4)
            grid.publish("x", me, epoch + 5)
            epoch += 5
        yield receive("x", epoch)
        grid.candidates[me] = step
        grid.arrived += 1
        yield lambda step=step: grid.arrived >= (step + 1) * grid.programs
        assert all(grid.candidates[other] == step for other in range(grid.programs))
        epoch += 1


def run(programs, hidden, inner, choose):
    """Run all programs to their ends, in the order that `choose` wants."""
    grid = Grid(programs, hidden, inner)
    lives = {me: program(grid, me) for me in range(programs)}
    waiting = {me: next(life) for me, life in lives.items()}
    while lives:
        ready = [me for me in lives if waiting[me]()]
        assert ready, "everybody waits"
        me = choose(ready)
        try:
            waiting[me] = next(lives[me])
        except StopIteration:
            del lives[me], waiting[me]


def slowest_last(slow):
    """Let one program move only when nobody else can."""
    return lambda ready: next((me for me in ready if me != slow), slow)


@pytest.mark.parametrize("programs", [1, 2, 3, 5, 8])
def test_no_word_is_lost_and_nobody_waits_for_ever(programs):
    for seed in range(20):
        run(programs, 8, 9, random.Random(seed).choice)
    for slow in range(programs):
        run(programs, 8, 9, slowest_last(slow))
    run(programs, 8, 9, max)
    run(programs, 8, 9, min)


def test_programs_without_a_share_would_be_left_behind():
    """Why `PersistentSteps` has at most as many programs as rows: the simulation finds out."""
    with pytest.raises(AssertionError, match="was overwritten"):
        for slow in range(6):
            run(6, 2, 2, slowest_last(slow))
