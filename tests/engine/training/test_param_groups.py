"""Divide the parameters of a model into param groups by name, layer and kind."""

import pytest
import torch
import transformers
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from engine.config import load_config
from engine.training.param_groups import build_param_groups


class Net(nn.Module):
    """A small transformer with the usual names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in "abc")
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)


def divide(model, parameters=None, **keys):
    optimizer = {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.2}, **keys}
    config = load_config({"train_batch_size": 4, "optimizer": optimizer})
    return build_param_groups(model, config.optimizer, parameters, config.model.wrap_classes)


def list_names(groups):
    return [sorted(group.parameters) for group in groups]


def find_rates(groups):
    """Return the learning rate of each parameter by name."""
    return {
        name: group.hyperparameters.get("lr", 0.1) for group in groups for name in group.parameters
    }


def test_groups_a_parameter_belongs_to_the_first_entry_that_matches():
    entries = [
        {"params": "^head\\.bias$", "lr": 1},
        {"params": ["head", "layers\\.1\\."], "name": "top", "betas": [0, 0.5]},
    ]
    model = Net()
    first, top, rest = divide(model, param_groups=entries)
    assert (first.name, top.name, rest.name) == ("^head\\.bias$", "top", "default")
    assert list(first.parameters) == ["head.bias"]
    assert sorted(top.parameters) == [
        "head.weight",
        *(f"layers.1.{part}" for part in ("0.bias", "0.weight", "1.bias", "1.weight")),
    ]
    every = [parameter for group in (first, top, rest) for parameter in group.parameters.values()]
    assert len(every) == len(set(every)) == len(list(model.parameters()))
    assert first.to_torch()["lr"] == 1.0
    assert top.to_torch()["betas"] == (0.0, 0.5)
    assert rest.to_torch().keys() == {"params", "name"}


def test_groups_of_entries_that_select_all_parameters_have_no_rest():
    groups = divide(Net(), param_groups=[{"params": "bias"}, {"params": "."}])
    assert [group.entry for group in groups] == [0, 1]


def test_groups_have_unique_names():
    entries = [{"params": "head", "name": "a"}, {"params": "norm", "name": "a"}]
    entries.append({"params": "embed", "name": "default"})
    names = [group.name for group in divide(Net(), param_groups=entries)]
    assert len(set(names)) == len(names) == 4


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("haed", "Similar names: `head`"),
        ("^layer\\.0\\.", "Similar names: `layers.0"),
        ("^heads\\.weight$", "`head.weight`"),
        ("zzzz", "`onecycle config --model` lists"),
    ],
)
def test_groups_pattern_that_matches_nothing_is_an_error_with_near_names(pattern, message):
    with pytest.raises(ValueError, match=r"`optimizer.param_groups.1.params` must match") as error:
        divide(Net(), param_groups=[{"params": "embed"}, {"params": ["head", pattern]}])
    assert message in str(error.value)


def test_groups_pattern_of_parameters_in_earlier_entries_is_an_error():
    with pytest.raises(
        ValueError, match=r"`optimizer.param_groups.0` already selects `head.weight`"
    ):
        divide(Net(), param_groups=[{"params": "head"}, {"params": "head.weight"}])


def test_groups_pattern_of_frozen_parameters_is_an_error():
    model = Net()
    model.embed.requires_grad_(False)
    with pytest.raises(ValueError, match="not trained, such as `embed.weight`"):
        divide(model, param_groups=[{"params": "embed"}])
    assert all("embed.weight" not in group.parameters for group in divide(model, no_decay=True))


def test_groups_a_shared_parameter_is_selected_by_any_of_its_names():
    model = Net()
    model.head.weight = model.embed.weight
    first, rest = divide(model, param_groups=[{"params": "head.weight"}])
    assert list(first.parameters) == ["embed.weight"]
    assert list(rest.parameters).count("embed.weight") == 0


def test_groups_of_given_parameters_contain_only_these():
    model = Net()
    groups = divide(model, model.head.parameters(), param_groups=[{"params": "bias"}])
    assert list_names(groups) == [["head.bias"], ["head.weight"]]


def test_groups_of_param_groups_or_strangers_are_rejected():
    model, key = Net(), {"param_groups": [{"params": "bias"}]}
    with pytest.raises(ValueError, match="the config has `optimizer.param_groups`. Pass the param"):
        divide(model, [{"params": list(model.parameters())}], **key)
    with pytest.raises(
        ValueError, match=r"got a parameter of shape \(2,\) that is not in the model"
    ):
        divide(model, [torch.nn.Parameter(torch.ones(2))], **key)


def build_bert():
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    with torch.device("meta"):
        return transformers.BertForSequenceClassification(config)


def test_no_decay_exempts_the_parameters_that_transformers_exempts():
    model = build_bert()
    forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [nn.LayerNorm], forbidden))
    decay, exempt = divide(model, no_decay=True)
    assert set(decay.parameters) == decayed
    assert set(exempt.parameters) == {name for name, _ in model.named_parameters()} - decayed
    assert exempt.hyperparameters == {"weight_decay": 0.0, "wd_mult": 0.0}
    assert decay.hyperparameters == {}


def test_no_decay_of_an_entry_replaces_that_of_the_optimizer():
    entries = [
        {"params": "head", "no_decay": False, "weight_decay": 0.3},
        {"params": "^norm", "weight_decay": 0},
    ]
    groups = divide(Net(), no_decay=True, param_groups=entries)
    assert list_names(groups)[:2] == [["head.bias", "head.weight"], ["norm.bias", "norm.weight"]]
    values = [group.hyperparameters.get("weight_decay", 0.2) for group in groups]
    assert values == [0.3, 0.0, 0.2, 0.0]
    (decay, _) = groups[2:]
    assert sorted(decay.parameters) == ["embed.weight", *(f"layers.{i}.0.weight" for i in range(3))]


def test_no_decay_includes_norms_with_several_dimensions():
    class GridNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2, 2))

    model = nn.Sequential(nn.Linear(2, 2), GridNorm())
    _, exempt = divide(model, no_decay=True)
    assert sorted(exempt.parameters) == ["0.bias", "1.scale"]


def get_layer_of_bert(name, count):
    """ELECTRA's layer-wise decay, as in the reference code of BERT: by the name only."""
    if name.startswith("bert.embeddings."):
        return 0
    if name.startswith("bert.encoder.layer."):
        return int(name.split(".")[3]) + 1
    return count + 1


def test_layer_decay_gives_each_block_of_bert_its_rate():
    rates = find_rates(divide(build_bert(), layer_decay=0.5))
    assert len(rates) == len(list(build_bert().named_parameters()))
    for name, lr in rates.items():
        assert lr == pytest.approx(0.1 * 0.5 ** (4 - get_layer_of_bert(name, 3))), name


def test_layer_decay_multiplies_the_lr_of_an_entry():
    entries = [{"params": "layers\\.1\\.", "lr": 1.0}]
    groups = divide(Net(), layer_decay=0.5, no_decay=True, param_groups=entries)
    rates = find_rates(groups)
    assert rates["embed.weight"] == pytest.approx(0.1 * 0.5**4)
    assert rates["layers.1.0.weight"] == rates["layers.1.1.bias"] == 0.25
    assert rates["layers.2.0.weight"] == 0.05
    assert rates["norm.weight"] == rates["head.bias"] == 0.1
    assert len({group.name for group in groups}) == len(groups)


class SequentialBlocks(nn.Module):
    """As in timm: the blocks are in a Sequential. The head is created first."""

    def __init__(self, name):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.pos_embed = nn.Parameter(torch.ones(1, 4))
        setattr(self, name, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def test_layer_decay_finds_blocks_in_a_sequential_and_a_head_that_is_created_first():
    rates = find_rates(divide(SequentialBlocks("blocks"), layer_decay=0.1))
    assert rates["pos_embed"] == pytest.approx(1e-4)
    assert rates["blocks.0.weight"] == pytest.approx(1e-3)
    assert rates["blocks.1.weight"] == pytest.approx(1e-2)
    assert rates["head.weight"] == pytest.approx(0.1)


def test_layer_decay_of_an_encoder_and_a_decoder_counts_through():
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2
    )
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    rates = find_rates(divide(model, layer_decay=0.5))
    assert rates["shared.weight"] == pytest.approx(0.1 * 0.5**5)
    assert rates["encoder.block.1.layer.1.DenseReluDense.wi.weight"] == pytest.approx(0.1 * 0.5**3)
    assert rates["encoder.final_layer_norm.weight"] == pytest.approx(0.1 * 0.5**2)
    assert rates["decoder.block.0.layer.2.layer_norm.weight"] == pytest.approx(0.1 * 0.5**2)
    assert rates["decoder.final_layer_norm.weight"] == pytest.approx(0.1)


def test_layer_decay_of_a_model_without_blocks_is_an_error_unless_wrap_names_them():
    model = SequentialBlocks("tower")
    with pytest.raises(ValueError, match="`optimizer.layer_decay` must be 1 if the blocks"):
        divide(model, layer_decay=0.5)
    optimizer = {"type": "SGD", "params": {"lr": 0.1}, "layer_decay": 0.5}
    config = {"train_batch_size": 4, "optimizer": optimizer, "engine": {"wrap": ["Sequential"]}}
    resolved = load_config(config)
    groups = build_param_groups(model, resolved.optimizer, wrap=resolved.model.wrap_classes)
    assert find_rates(groups)["tower.1.weight"] == 0.05
