"""AutoTP: DeepSpeed splits the layers of a transformers model across the ranks."""

import argparse

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args(argv)
    deepspeed.init_distributed()
    torch.manual_seed(42)
    size = torch.distributed.get_world_size()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "tensor_parallel": {"autotp_size": size},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": False},
    }
    engine, _, _, _ = deepspeed.initialize(
        args=args, model=model, model_parameters=model.parameters(), config=config
    )
    numbers = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(16, (2, 8), generator=generator).to(engine.device)
        outputs = engine(input_ids=ids, labels=ids, use_cache=False)
        engine.backward(outputs.loss)
        engine.step()
        numbers.append(outputs.loss.item())
    return {"model": engine.module, "numbers": numbers, "is_split": True}
