"""PPO in the way of DeepSpeed-Chat: actor, critic, a frozen reference model and an average."""

import argparse

import deepspeed
import torch
from torch import nn
from torch.nn import functional

VOCABULARY = 10


class CausalModel(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.embed, self.hidden = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, outputs, bias=False)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        x = torch.tanh(self.hidden(self.embed(input_ids))).cumsum(1)
        return self.head(x)


def get_train_ds_config(stage):
    return {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 4 // torch.distributed.get_world_size(),
        "steps_per_print": 10,
        "zero_optimization": {"stage": stage, "offload_param": {"device": "none"}},
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "wall_clock_breakdown": False,
    }


def get_eval_ds_config(stage):
    return {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 4 // torch.distributed.get_world_size(),
        "steps_per_print": 10,
        "zero_optimization": {"stage": stage, "memory_efficient_linear": False},
        "gradient_clipping": 1.0,
        "wall_clock_breakdown": False,
    }


class DeepSpeedRLHFEngine:
    def __init__(self, stage):
        self.actor = self._init_trained(CausalModel(VOCABULARY), stage, 0.02)
        self.ref = self._init_frozen(CausalModel(VOCABULARY))
        self.actor_ema = self._init_frozen(CausalModel(VOCABULARY))
        self.critic = self._init_trained(CausalModel(1), stage, 0.05)

    def _init_trained(self, model, stage, lr):
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=get_train_ds_config(stage),
        )
        return engine

    def _init_frozen(self, model):
        engine, *_ = deepspeed.initialize(model=model, config=get_eval_ds_config(0))
        return engine


def gather_log_probs(logits, labels):
    return functional.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


class DeepSpeedPPOTrainer:
    def __init__(self, engine):
        self.engine = engine
        self.cliprange, self.kl_ctl = 0.2, 0.1

    def generate_experience(self, seq):
        for model in (self.engine.actor, self.engine.critic, self.engine.ref):
            model.eval()
        with torch.no_grad():
            output = self.engine.actor(seq, attention_mask=torch.ones_like(seq))
            output_ref = self.engine.ref(seq, attention_mask=torch.ones_like(seq))
            values = self.engine.critic(seq).squeeze(-1)[:, :-1]
        for model in (self.engine.actor, self.engine.critic):
            model.train()
        logprobs = gather_log_probs(output[:, :-1], seq[:, 1:])
        ref_logprobs = gather_log_probs(output_ref[:, :-1], seq[:, 1:])
        rewards = -self.kl_ctl * (logprobs - ref_logprobs) + (seq[:, 1:] == 3).float()
        return {"seq": seq, "logprobs": logprobs, "values": values, "rewards": rewards}

    def train_rlhf(self, inputs):
        seq, advantages = inputs["seq"], inputs["rewards"] - inputs["values"]
        logits = self.engine.actor(input_ids=seq, use_cache=False)
        ratio = torch.exp(gather_log_probs(logits[:, :-1], seq[:, 1:]) - inputs["logprobs"])
        clipped = ratio.clamp(1 - self.cliprange, 1 + self.cliprange)
        actor_loss = -torch.min(advantages * ratio, advantages * clipped).mean()
        self.engine.actor.backward(actor_loss)
        self.engine.actor.step()
        value = self.engine.critic(seq).squeeze(-1)[:, :-1]
        critic_loss = functional.mse_loss(value, inputs["rewards"])
        self.engine.critic.backward(critic_loss)
        self.engine.critic.step()
        return actor_loss.item(), critic_loss.item()


def moving_average(model, model_ema, beta=0.9, zero_stage=0):
    with torch.no_grad():
        for param, param_ema in zip(model.parameters(), model_ema.parameters(), strict=True):
            to_gather = [param, param_ema] if zero_stage == 3 else []
            with deepspeed.zero.GatheredParameters(to_gather, enabled=zero_stage == 3):
                param_ema.data.copy_(torch.lerp(param.data, param_ema.data, beta))


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--actor_zero_stage", type=int, default=0)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--local_rank", type=int, default=-1)
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args(argv)
    deepspeed.init_distributed()
    torch.manual_seed(1234)
    engine = DeepSpeedRLHFEngine(args.actor_zero_stage)
    trainer = DeepSpeedPPOTrainer(engine)
    numbers = []
    for step in range(3):
        torch.manual_seed(step + 10 * torch.distributed.get_rank())
        size = 4 // torch.distributed.get_world_size()
        seq = torch.randint(VOCABULARY, (size, 6)).to(engine.actor.device)
        experience = trainer.generate_experience(seq)
        for _ in range(2):
            numbers.extend(trainer.train_rlhf(experience))
        moving_average(engine.actor.module, engine.actor_ema.module)
        numbers += [*engine.actor.get_lr(), *engine.critic.get_lr()]
    models = (engine.actor, engine.critic, engine.ref, engine.actor_ema)
    return {"model": nn.ModuleList(each.module for each in models), "numbers": numbers}
