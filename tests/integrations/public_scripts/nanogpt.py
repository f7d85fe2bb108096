"""A small GPT: the optimizer and the learning rate are the script's, evaluation in between."""

import math

import deepspeed
import torch
from torch import nn
from torch.nn import functional

block_size, n_embd, vocab_size = 8, 8, 12
batch_size, gradient_accumulation_steps = 2, 4
learning_rate, min_lr, warmup_iters, lr_decay_iters = 1e-2, 1e-3, 2, 6


class CausalSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.register_buffer("bias", torch.tril(torch.ones(block_size, block_size)))

    def forward(self, x):
        length = x.size(1)
        q, k, v = self.c_attn(x).split(n_embd, dim=2)
        att = (q @ k.transpose(-2, -1)) / math.sqrt(n_embd)
        att = att.masked_fill(self.bias[:length, :length] == 0, float("-inf"))
        return self.c_proj(functional.softmax(att, dim=-1) @ v)


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.ln, self.attn = nn.LayerNorm(n_embd), CausalSelfAttention()
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        logits = self.lm_head(x + self.attn(self.ln(x)))
        if targets is None:
            return logits, None
        return logits, functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay):
        params = {n: p for n, p in self.named_parameters() if p.requires_grad}
        groups = [
            {"params": [p for p in params.values() if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def get_lr(it):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


def get_batch(seed, device):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(vocab_size, (batch_size, block_size), generator=generator)
    return x.to(device), ((x + 1) % vocab_size).to(device)


@torch.no_grad()
def estimate_loss(model):
    model.eval()
    losses = [model(*get_batch(1000 + k, model.device))[1].item() for k in range(2)]
    model.train()
    return sum(losses) / len(losses)


def main(argv):
    del argv
    deepspeed.init_distributed()
    torch.manual_seed(1337)
    model = GPT()
    optimizer = model.configure_optimizers(weight_decay=0.1)
    world_size = torch.distributed.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps // world_size,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
    }
    model_engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config
    )
    numbers = []
    seed = 100 * torch.distributed.get_rank()
    for iter_num in range(6):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(iter_num)
        if iter_num % 3 == 0:
            numbers.append(estimate_loss(model_engine))
        for _ in range(model_engine.gradient_accumulation_steps()):
            x, y = get_batch(seed := seed + 1, model_engine.device)
            _, loss = model_engine(x, y)
            model_engine.backward(loss)
            numbers.append(int(model_engine.is_gradient_accumulation_boundary()))
            model_engine.step()
        numbers += [loss.item(), model_engine.get_lr()[0]]
    return {"model": model_engine.module, "numbers": numbers}
