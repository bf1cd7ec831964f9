"""What the processes of a data-parallel training do; imported by each, so it imports little."""

import os

import torch

from mobilellm_fast.config import MobileLLMConfig
from mobilellm_fast.model import MobileLLM

STEPS = 3


def build() -> tuple[MobileLLM, torch.Tensor]:
    """The same model and the same batch of 4 in every process."""
    torch.manual_seed(0)
    config = MobileLLMConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        layer_sharing=True,
        initializer_range=0.1,
    )
    return MobileLLM(config), torch.randint(0, 97, (4, 12))


def steps(runner: torch.nn.Module, ids: torch.Tensor):
    """Train on a batch and yield each step's loss."""
    optimizer = torch.optim.SGD(runner.parameters(), lr=0.1)
    for _ in range(STEPS):
        loss = runner(ids, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()


def use_kernels() -> list[str]:
    """Interpret a GPU's kernels, also those of whole blocks, which take 16 bits alone elsewhere.

    Returns a list that grows with each block's derivative.
    """
    import interpreted

    interpreted.interpret_kernels()
    from mobilellm_fast import decoder, layers, op_cuda

    op_cuda.takes_one_half = op_cuda.takes_one_dtype
    layers.ops = decoder.ops = interpreted.ops_with_kernels()[0]
    from mobilellm_fast.kernels import decoder_block

    ran, backward = [], decoder_block.decoder_block_backward

    def noted(*args):
        ran.append("block")
        return backward(*args)

    decoder_block.decoder_block_backward = noted
    return ran


def train(rank: int, world: int, port: int, kind: str, kernels: bool, path) -> None:
    """Train on this process's part of the batch; the first process writes the mean losses."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ran = use_kernels() if kernels else None
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    lm, ids = build()
    runner = lm
    if kind == "ddp":
        runner = torch.nn.parallel.DistributedDataParallel(lm)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.init_device_mesh("cpu", (world,))
        for block in lm.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(lm, mesh=mesh)
    losses = []
    for loss in steps(runner, ids.chunk(world)[rank]):
        torch.distributed.all_reduce(loss)
        losses.append(loss.item() / world)
    assert ran is None or len(ran) == STEPS * len(lm.config.schedule)
    if rank == 0:
        torch.save(losses, path)
    torch.distributed.destroy_process_group()
